"""The page at `/`: shows what the websocket sends, as it comes."""
