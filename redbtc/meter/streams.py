"""The meter of server-sent events."""

from __future__ import annotations

import re
from typing import Literal

from redbtc.meter.answers import MAX_AT_ONCE, STEP, Answer, answer_steps
from redbtc.meter.events import (
    EVENT_END,
    EVENT_START_SIZE,
    LAST,
    EventText,
    audio_may_matter,
    chat_may_matter,
    data_of,
    may_matter,
)
from redbtc.meter.meters import Meter
from redbtc.meter.report import Report
from redbtc.meter.scanner import BYTE_ORDER_MARK
from redbtc.meter.shown_answers import shown_event
from redbtc.meter.usage_fields import has_choices
from redbtc.steps import Steps, result_of

EVENT_TYPE = re.compile(rb'(?:event: ?([^\r\n]*)[\r\n]|data: ?\{"type": ?"([^"\\]*)")')
CHAT_CHUNK = re.compile(rb"data: ?\{")
STRING_VALUE = rb' ?"([^"\\]*+(?:\\.[^"\\]*+)*+)"'
CHAT_TEXT = re.compile(
    rb'"(?:content|arguments|refusal|reasoning(?:_content)?|name|input|text|transcript)":'
    + STRING_VALUE,
    re.DOTALL,
)
RESPONSE_TEXT = re.compile(rb'"delta":' + STRING_VALUE, re.DOTALL)
# Speech is base64; some upstreams send transcriptions in chunks as those of chats.
AUDIO_TEXT = re.compile(rb'"(?:delta|audio|content)":' + STRING_VALUE, re.DOTALL)
PICTURE_EVENT = re.compile(rb'image_\w+\.\w|"b64_json"')  # in the first bytes of an event
# By whether the id and the model are still unknown: events that can contain them.
NAMING = {
    (True, True): re.compile(rb'"(?:id|model)"\s*+:\s*+"[^"]'),
    (True, False): re.compile(rb'"id"\s*+:\s*+"[^"]'),
    (False, True): re.compile(rb'"model"\s*+:\s*+"[^"]'),
    (False, False): None,
}
MAX_HELD = 64 << 10  # bytes of an incomplete event that are held back whole
# The types of events of which a part may be sent on: they don't end an answer or report an error.
MAY_BEGIN = re.compile(
    rb"response\.(?!(?:completed|incomplete|failed)\Z).*|image_\w+\.(?!completed\Z).*"
)
HELD_END = 64  # bytes that are held back of a larger event that may end the answer


Verdict = Literal[  # on a whole event
    "pass",
    "last",  # it ends the answer
    "take_out",  # it is the usage chunk, which the client did not ask for
]


class StreamMeter(Meter):
    """Meters server-sent events.

    - `take_out_usage`: the gateway asked for the chat's usage chunk, which is taken out of what the
      client gets.
    - `ends`: the number of events that end the response, one for each image that was asked for.
    - `expects_usage`: the chat was asked to report its usage, so if that has not come before
      the end, the meter waits for it.
    - `hides_errors`: an error about the operator's credentials gets the gateway's own text.
    """

    def __init__(
        self,
        *,
        images: bool,
        chat: bool,
        audio: bool = False,
        take_out_usage: bool,
        ends: int = 1,
        expects_usage: bool = False,
        hides_errors: bool = False,
    ) -> None:
        self.report = Report(images)
        self._chat = chat
        self._images = images
        self._text = CHAT_TEXT if chat else AUDIO_TEXT if audio else RESPONSE_TEXT
        self._may_matter = chat_may_matter if chat else audio_may_matter if audio else may_matter
        self._take_out_usage = take_out_usage
        self._expects_usage = expects_usage or take_out_usage
        self._hides_errors = hides_errors
        self._may_change = hides_errors or take_out_usage
        self._ends = ends
        self._ends_seen = 0
        # Events that can contain the id or the model, while they are unknown. Pictures and audio
        # have none.
        self._naming = None if images or audio else NAMING[True, True]
        self._partial: EventText | None = None  # the event that is still incomplete
        self._tail = b""  # its last two bytes, since the end of an event can be cut in two
        self._begun = False  # some of it has been sent on
        self._held = b""  # the part of it that is held back
        self._waiting = b""  # from the event that ends the answer on: waits for the row's commit
        # The verdict on an event that ended with a CR, for the LF that can follow.
        self._cut_newline: Verdict | None = None

    def feed(self, chunk: bytes) -> bytes:
        """Take the next bytes of the answer, at most MAX_AT_ONCE; return what may be sent on
        now."""
        if self.state == "ended":
            return chunk
        if self.can_skip_parsing(chunk):
            self.count_text(chunk)
            return chunk
        return result_of(self._read(chunk))

    def steps(self, chunk: bytes) -> Steps[bytes]:
        passed: list[bytes] = []
        for at in range(0, len(chunk), STEP):
            if self.state == "ended":
                self._held += chunk[at:]
                break
            passed.append((yield from self._read(chunk[at : at + STEP])))
            yield
        return b"".join(passed)

    def _read(self, chunk: bytes) -> Steps[bytes]:
        """Take a chunk of at most MAX_AT_ONCE bytes; return what may be sent on now."""
        passed: list[bytes] = []
        if self._cut_newline and chunk:
            if chunk.startswith(b"\n"):
                self._pass(b"\n" if self._cut_newline == "pass" else b"", passed)
                chunk = chunk[1:]
            self._cut_newline = None
        start, shift = 0, len(self._tail)
        for match in EVENT_END.finditer(self._tail + chunk):
            end = match.end() - shift
            yield from self._end_event(chunk[start:end], passed)
            start = end
        if start < len(chunk):
            self._cut_newline = None
            yield from self._take_part(chunk[start:], passed)
        return b"".join(passed)

    def can_skip_parsing(self, chunk: bytes) -> bool:
        """Return whether a chunk has only whole events in the usual form, none of which can matter,
        as nearly every chunk has. Then nothing is to be done but to count its text."""
        return (
            self._partial is None
            and (self._naming is None or not self._naming.search(chunk))
            and self.state == "open"
            and not self._cut_newline
            and chunk.endswith(b"\n\n")
            and not self._may_matter(chunk)
        )

    def finish_steps(self) -> Steps[None]:
        """Note that the upstream has sent everything. A last event without its empty line counts,
        and so does what arrived of an event that is cut off. A stream of fewer images than were
        asked for is complete, unless its last event is cut off."""
        is_cut_off = False
        if self._partial is not None and self.state != "ended":
            answer = yield from self._partial.partial_answer()
            if answer and self._partial.is_cut_off:
                is_cut_off = True
                if self._hides_errors and not self._begun:
                    self._held = shown_event(self._held, is_cut_off=True)
                yield from self._take_cut_off(answer)
            else:
                rest: list[bytes] = []
                yield from self._end_event(b"", rest)
                self._waiting += b"".join(rest)
        if self.state == "ending" or (self._ends_seen and not is_cut_off):
            self.state = "ended"

    def cut_off_steps(self) -> Steps[None]:
        answer = (yield from self._partial.partial_answer()) if self._partial else None
        if answer:
            yield from self._take_cut_off(answer)

    def _take_cut_off(self, answer: Answer) -> Steps[None]:
        """Take in, once, what arrived of an event that was cut off."""
        self._partial = None
        self.report.passed.see_delta(answer, self._chat)
        yield from self.report.note(answer, cut_off=True)

    def rest(self) -> bytes:
        waiting = self._waiting + self._held
        self._waiting = self._held = b""
        return waiting

    def count_text(self, events: bytes) -> None:
        """Count the text in these events, for an estimate."""
        for text in self._text.findall(events):
            self.report.passed.deltas += len(text)

    def _end_event(self, segment: bytes, passed: list[bytes]) -> Steps[None]:
        """Judge the event that `segment` ends, and send on what may be sent."""
        event, begun = self._partial, self._begun
        if event is not None:
            yield from event.steps(segment)
        self._partial, self._tail, self._begun = None, b"", False
        self.at_once = MAX_AT_ONCE
        verdict: Verdict = "pass"
        held, self._held = self._held + segment, b""
        if self.state != "ended":
            verdict = yield from self._judge(event, segment)
            self._resume_pictures(event.start if event else segment, len(held), passed)
            if begun and verdict == "take_out":  # too late: its beginning has been sent
                verdict = "pass"
            if self.report.failed and self._hides_errors and not begun:
                held = shown_event(held)
            if verdict == "last":
                self.state, verdict = "ending", "pass"
            if self.state == "ending" and not self._expects_more():
                self.state = "ended"
            self._cut_newline = verdict if held.endswith(b"\r") else None
        elif self._hides_errors and not begun:
            held = shown_event(held)
        if verdict == "pass":
            self._pass(held, passed)

    def _pass(self, held: bytes, passed: list[bytes]) -> None:
        """Send on these bytes, or let them wait for the row if the answer is ending."""
        if self.state == "open":
            passed.append(held)
        else:
            self._waiting += held

    def _resume_pictures(self, start: bytes, size: int, passed: list[bytes]) -> None:
        """Send on what was held back if a stream of pictures goes on after an event that seemed to
        end it: if another event, which begins with `start` and has `size` bytes so far, is a
        picture and too large to be held back."""
        if self.state != "ending" or not self._images:
            return
        too_large = len(self._waiting) + size > MAX_HELD
        if too_large and PICTURE_EVENT.search(start[:EVENT_START_SIZE]):
            passed.append(self._waiting)
            self.state, self._waiting = "open", b""

    def _expects_more(self) -> bool:
        """Return whether more usage may follow the event that ends the answer. After a picture
        another one can come until the stream ends."""
        report = self.report
        expected = self._expects_usage and not (report.usage or report.failed)
        # The event that seems to be the end can have MAX_HELD bytes; as many may follow.
        return (self._images or expected) and len(self._waiting) <= 2 * MAX_HELD

    def _take_part(self, chunk: bytes, passed: list[bytes]) -> Steps[None]:
        """Take a part of the incomplete event, and send on what can't turn out to matter."""
        if self.state == "ended":
            self._held += chunk
            return
        if self._partial is None:
            self._partial = EventText()
        yield from self._partial.steps(chunk)
        if self._partial.is_long:
            self.at_once = 0
        self._tail = (self._tail + chunk)[-2:]
        self._held += chunk
        self._resume_pictures(self._partial.start, len(self._held), passed)
        if self.state == "ending":
            if len(self._held) > MAX_HELD:
                self.state = "ended"
            return
        keep = 0
        if must_be_held(self._partial.start, self._chat, self._may_change):
            keep = len(self._held) if len(self._held) <= MAX_HELD else HELD_END
            if len(self._held) > keep and self._hides_errors and not self._begun:
                self._held = shown_event(self._held)  # errors come before long members
        sent = len(self._held) - keep
        self._begun = self._begun or sent > 0
        passed.append(self._held[:sent])
        self._held = self._held[sent:]

    def _judge(self, event: EventText | None, segment: bytes) -> Steps[Verdict]:
        """Take in what an event reports, and return the verdict on it. If it did not come in parts
        (`event` is None), all of it is in `segment`."""
        if event is not None and event.is_large:
            answer = yield from event.answer()
            if answer:
                self.report.passed.see_delta(answer, self._chat)
            return (yield from self._note(answer))
        whole = event.whole() if event else segment
        self.count_text(whole)
        if not self._may_matter(whole) and not (self._naming and self._naming.search(whole)):
            return "pass"
        data = data_of(whole)
        if not data:
            return "pass"
        if data.strip() == b"[DONE]":
            return "last"
        return (yield from self._note((yield from answer_steps(data))))

    def _note(self, answer: Answer | None) -> Steps[Verdict]:
        """Take in what an event reports, and return the verdict on it."""
        if answer is None:
            return "pass"
        report = self.report
        yield from report.note(answer)
        # If text has passed since output was reported, this usage reports no output of its own.
        if self._chat and isinstance(answer.usage, dict) and not report.is_outdated:
            report.is_of_choices = has_choices(answer)
        if self._naming:
            self._naming = NAMING[report.response_id is None, report.model is None]
        if isinstance(answer.type, str) and LAST.fullmatch(answer.type.encode()):
            self._ends_seen += not self._chat
            return "last" if self._ends_seen >= self._ends else "pass"
        is_removed = self._take_out_usage and is_usage_chunk(answer)
        return "take_out" if is_removed else "pass"


def is_usage_chunk(answer: Answer) -> bool:
    """Return whether a chat's chunk is the one that only reports the usage."""
    return isinstance(answer.usage, dict) and not has_choices(answer) and not answer.error


def must_be_held(start: bytes, chat: bool, may_change: bool) -> bool:
    """Return whether an event with this start may end the answer or, if `may_change`, may have to
    be taken out or changed."""
    start = start.removeprefix(BYTE_ORDER_MARK).lstrip(b"\r\n")
    if chat:
        return may_change or not CHAT_CHUNK.match(start)
    match = EVENT_TYPE.match(start)
    return not match or not MAY_BEGIN.fullmatch(match[1] or match[2] or b"")
