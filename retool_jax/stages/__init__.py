"""The stages of a run, one module per binary: from configuration to a run folder."""
