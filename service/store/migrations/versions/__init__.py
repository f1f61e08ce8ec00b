"""The steps, in the order of their names; `down_revision` chains them."""
