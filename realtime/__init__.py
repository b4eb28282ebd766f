"""The real-time edge. On its way to a websocket, an event travels through the folders feed, fanout, wire and sockets,
in this order. The folders sse, presence and asyncapi are not part of this path.
"""
