// Gives Node the WebSocket of the package ws: `node --require ./websocket_of_ws.cjs program.mjs`.
globalThis.WebSocket ??= require("ws").WebSocket;
