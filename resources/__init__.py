"""Resources, each declared once: table, body, fields, topic and rights."""
