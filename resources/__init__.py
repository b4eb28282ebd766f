"""What resources, topics and accounts are, declared once: tables, bodies, entities, filter fields, who may write."""
