"""Measuring a model here: `upwell bench prefill | decode | serve`."""
