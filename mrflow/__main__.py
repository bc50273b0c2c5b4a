"""python -m mrflow"""

from mrflow.cli import main

main()
