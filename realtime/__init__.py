"""The real-time edge. An event passes through the folders feed, fanout, wire and sockets, in this order; sse, presence
and asyncapi stand beside them.
"""
