// For Node without a WebSocket of its own: `node --require ./websocket_of_ws.cjs program.mjs` takes that of the package ws.
globalThis.WebSocket ??= require("ws").WebSocket;
