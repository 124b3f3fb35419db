"""`python -m adaplex_server` is the command line `adaplex`."""

from adaplex_server.cli import main

if __name__ == "__main__":
    main()
