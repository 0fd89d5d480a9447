"""``python -m helpers.recording`` (``make record``): measure on this machine's GPU."""

import sys

from helpers.recording.file import main

sys.exit(main())
