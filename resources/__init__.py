"""What a resource is, declared once: its table, its body, its fields, its topic, who may write."""
