"""upwell-nano: the embedded model, its data recipe, and the rules it has to beat."""
