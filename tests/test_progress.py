"""A bar shows to a reader, and leaves nothing in a file."""

import pytest
from jupyter_client.manager import run_kernel

from helpers.progress import progress_bar

USE = """
import sys, warnings
warnings.simplefilter("error")
from helpers.progress import progress_bar
with progress_bar(3, "step") as bar:
    for _ in range(3):
        bar.update()
print(bar.n)
"""


@pytest.fixture(scope="module")
def kernel():
    with run_kernel() as client:
        yield client


def outputs(kernel, code: str, watched: bool) -> list[str]:
    """Run code as a notebook's cell; return what kinds of output it has."""
    found = []

    def note(message):
        if message["msg_type"] in ("stream", "display_data", "error"):
            found.append(message["content"].get("name", message["msg_type"]))

    kernel.execute_interactive(
        code, allow_stdin=watched, output_hook=note, stdin_hook=print, timeout=60
    )
    return found


def test_a_notebook_that_nobody_watches_gets_no_bar(kernel):
    assert outputs(kernel, USE, watched=False) == ["stdout"]


def test_a_reader_sees_a_bar(kernel):
    assert outputs(kernel, USE, watched=True) == ["display_data", "stdout"]


def test_without_widgets_there_is_a_plain_bar_and_no_warning(kernel):
    block = "import sys; sys.modules['ipywidgets'] = None\n"
    block += "for name in [n for n in sys.modules if 'tqdm' in n or 'progress' in n]:\n"
    block += "    del sys.modules[name]\n"
    assert set(outputs(kernel, block + USE, watched=True)) == {"stderr", "stdout"}
    assert outputs(kernel, USE, watched=False) == ["stdout"]


@pytest.mark.parametrize("shown", [True, False])
def test_a_terminal_sees_it_and_then_no_more(capsys, shown):
    with progress_bar(2, "step", shown) as bar:
        bar.update(2)
    out, err = capsys.readouterr()
    assert not out and bool(err) == shown
    assert not err.split("\r")[-2:][0].strip()  # the last that is drawn is blank
