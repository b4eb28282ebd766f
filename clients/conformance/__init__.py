"""Does a client do what docs/protocol.md asks of it? `python -m clients.conformance --help`; README.md tells the rest.

`scenario.py` reads scenarios.json and compares; `server.py` serves them on real sockets; `driver.py` starts the client
under test and tells it what to do; `live.py` tries it on the real service; `runner.py` puts these together.
"""
