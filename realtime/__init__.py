"""The real-time edge. An event travels through the folders feed, fanout, wire and sockets, in this order; sse, presence
and asyncapi stand beside them.
"""
