"""What a step would need on TPUs that are not here."""
