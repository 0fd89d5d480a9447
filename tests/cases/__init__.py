"""Situations that people report, and random ones: right, or refused in a sentence."""

import pytest

pytest.register_assert_rewrite("tests.cases.agreement")
