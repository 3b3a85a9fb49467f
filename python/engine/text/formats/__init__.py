"""How models write their thoughts and tool calls: one file a format, read as the text arrives."""
