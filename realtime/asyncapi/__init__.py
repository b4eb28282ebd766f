"""The AsyncAPI document and the models of the frames in it."""
