"""The conformance suite: checks that a client follows docs/protocol.md. README.md describes it.

`scenario.py` reads scenarios.json and compares reports; `server.py` plays the server on real sockets; `driver.py`
starts the client under test and sends commands; `live.py` tests the client against the real service;
`runner.py` runs the scenarios.
"""
