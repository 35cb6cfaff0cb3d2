"""Pictures of a run by matplotlib, which is imported when one is drawn."""
