"""Text and ids: tokenizers, the tag automaton over tokens, prompts, snippets and feedback."""
