"""What a token of a sequence is. OTHER: padding, template words, role markers and the answer; none of these
enters a query."""

SEGMENT_OTHER, SEGMENT_IMAGE, SEGMENT_CONTEXT, SEGMENT_INSTRUCTION = 0, 1, 2, 3
