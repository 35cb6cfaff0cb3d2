"""Cold-start traces: who rewrites them, what is mended in them, and what holds when their snippets are run."""
