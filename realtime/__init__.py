"""The socket edge. An event travels feed, fanout, wire, sockets; sse, presence and asyncapi stand beside them."""
