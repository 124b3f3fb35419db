"""`python -m adaplex_loadtest`: load, overload and soak of a running server, as JSON lines and an HTML page."""

from adaplex_loadtest.command_line import main

if __name__ == "__main__":
    main()
