"""V4's prompt encoding and its replies. Text in, text out: no torch, no tokenizer."""

from upwell.chat.encoding import Thinking, encode_messages
from upwell.chat.parsing import Content, Reasoning, ReplyParser, ToolCall

__all__ = ["Content", "Reasoning", "ReplyParser", "Thinking", "ToolCall", "encode_messages"]
