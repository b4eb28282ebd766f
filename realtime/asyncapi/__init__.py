"""The AsyncAPI document and the models of every frame."""
