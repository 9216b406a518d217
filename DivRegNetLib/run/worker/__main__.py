import sys

from DivRegNetLib.run.worker.child import main

if __name__ == "__main__":
    main(sys.argv[1])
