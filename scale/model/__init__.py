"""The model: encoder, condition, flow head, losses, on layers from one provider."""
