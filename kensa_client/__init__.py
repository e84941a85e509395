"""A client for lines and scripts: `Kensa`, and `AsyncKensa` with the same methods.

    with Kensa("http://kensa-3.local:8000", deadline_s=0.3) as kensa:
        if not kensa.inspect_safely(picture, part="KB-2046/A 17"):
            stop_the_part()

It needs httpx, and nothing else of this repository.
"""

from kensa_client.asking import DecisionFilter
from kensa_client.asynchronous import AsyncKensa
from kensa_client.blocking import Kensa
from kensa_client.errors import KensaError, KensaRefused, NoAnswer, NoVerdict, Try
from kensa_client.verdict import PartVerdict, SafeVerdict, Timing, Verdict

__all__ = [
    "AsyncKensa",
    "DecisionFilter",
    "Kensa",
    "KensaError",
    "KensaRefused",
    "NoAnswer",
    "NoVerdict",
    "PartVerdict",
    "SafeVerdict",
    "Timing",
    "Try",
    "Verdict",
]
