"""`python -m eve_vlm.cli` runs the command `eve`, where the program's folder is not on the PATH.

The guard matters: tools that import every module must not start a command by doing so.
"""

from eve_vlm.cli import main

if __name__ == "__main__":
    main()
