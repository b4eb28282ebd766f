"""The socket edge. An event passes the folders in this order: feed, fanout, wire, sockets; sse, presence and asyncapi
stand beside them.
"""
