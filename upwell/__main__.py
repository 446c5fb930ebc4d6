"""python -m upwell, as torchrun starts it"""

import sys

from upwell.cli.main import main

sys.exit(main())
