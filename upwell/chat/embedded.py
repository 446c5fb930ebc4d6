"""What the embedded model answers to small talk."""

NANO_NOTICE = (
    "I'm upwell-nano, a small DeepSeek V4 trained for one job: questions on a table, as in "
    '`upwell ask FILE "question"`. I can\'t chat or write; for that, start Upwell with a V4 checkpoint: --model PATH.'
)
