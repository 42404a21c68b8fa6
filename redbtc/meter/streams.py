"""The meter of event streams."""

from __future__ import annotations

import re
from collections.abc import Generator

from redbtc.meter.answers import MAX_AT_ONCE, STEP, Answer, answer_steps, result_of
from redbtc.meter.events import LAST, START, EventText, chat_marked, data_of, marked
from redbtc.meter.meters import Meter
from redbtc.meter.report import Report
from redbtc.meter.scanner import BYTE_ORDER_MARK
from redbtc.meter.usage_fields import has_choices

# WHATWG HTML §9.2.6: lines end with LF, CR or CRLF, an event ends with an empty line.
EVENT_END = re.compile(rb"(?>\r\n|\n|\r)(?>\r\n|\n|\r)")
EVENT_TYPE = re.compile(rb'(?:event: ?([^\r\n]*)[\r\n]|data: ?\{"type": ?"([^"\\]*)")')
CHAT_CHUNK = re.compile(rb"data: ?\{")
STRING_VALUE = rb' ?"([^"\\]*+(?:\\.[^"\\]*+)*+)"'
CHAT_TEXT = re.compile(
    rb'"(?:content|arguments|refusal|reasoning(?:_content)?|name|input|text|transcript)":'
    + STRING_VALUE,
    re.DOTALL,
)
RESPONSE_TEXT = re.compile(rb'"delta":' + STRING_VALUE, re.DOTALL)
PICTURE = re.compile(rb'image_\w+\.\w|"b64_json"')  # within an event that begins so
# By what is still to be found: events that can name it.
NAMING = {
    (True, True): re.compile(rb'"(?:id|model)"\s*+:\s*+"[^"]'),
    (True, False): re.compile(rb'"id"\s*+:\s*+"[^"]'),
    (False, True): re.compile(rb'"model"\s*+:\s*+"[^"]'),
    (False, False): None,
}
HOLD = 64 << 10
HOLD_BACK = 64


class StreamMeter(Meter):
    """Meters server-sent events. `take_out_usage`: the gateway asked for the chat's usage chunk,
    and removes it from what the client gets. `ends`: how many events end the response, one for each
    image that was asked for. `expects_usage`: a chat was asked to report its usage, so that it is
    waited for if it has not come before the end."""

    def __init__(
        self,
        *,
        images: bool,
        chat: bool,
        take_out_usage: bool,
        ends: int = 1,
        expects_usage: bool = False,
    ) -> None:
        self.report = Report(images)
        self.ended = False
        self.ending = False
        self._chat = chat
        self._images = images
        self._text = CHAT_TEXT if chat else RESPONSE_TEXT
        self._marked = chat_marked if chat else marked
        self._take_out_usage = take_out_usage
        self._expects_usage = expects_usage or take_out_usage
        self._ends = ends
        self._ends_seen = 0
        # Events in which the model or the id can be, while they are not known. Pictures have none.
        self._naming = None if images else NAMING[True, True]
        self._partial: EventText | None = None  # the event that is still incomplete
        self._tail = b""  # its last two bytes: an event's end may be cut
        self._begun = False  # some of it has been sent on
        self._held = b""  # what waits of it
        self._waiting = b""  # what waits for the row: from the event that ends the answer on
        self._cut_newline = ""  # what to do with the LF of a CRLF whose CR ended an event

    def feed(self, chunk: bytes) -> bytes:
        """Return what may be sent on now, in order."""
        if self.ended:
            return chunk
        if self.can_skip_parsing(chunk):
            self.count_text(chunk)
            return chunk
        return result_of(self._read(chunk))

    def steps(self, chunk: bytes) -> Generator[None, None, bytes]:
        passed: list[bytes] = []
        for at in range(0, len(chunk), STEP):
            if self.ended:
                self._held += chunk[at:]
                break
            passed.append((yield from self._read(chunk[at : at + STEP])))
            yield
        return b"".join(passed)

    def _read(self, chunk: bytes) -> Generator[None, None, bytes]:
        """Take a chunk of at most MAX_AT_ONCE bytes; return what may be sent on now."""
        passed: list[bytes] = []
        if self._cut_newline and chunk:
            if chunk.startswith(b"\n"):
                self._pass(b"\n" if self._cut_newline == "pass" else b"", passed)
                chunk = chunk[1:]
            self._cut_newline = ""
        start, shift = 0, len(self._tail)
        for match in EVENT_END.finditer(self._tail + chunk):
            end = match.end() - shift
            yield from self._complete(chunk[start:end], passed)
            start = end
        if start < len(chunk):
            yield from self._grow(chunk[start:], passed)
        return b"".join(passed)

    def can_skip_parsing(self, chunk: bytes) -> bool:
        """Whether these are whole events in the usual form, none of which can matter: nearly every
        chunk. There is nothing to be done with it but to count its text."""
        return (
            self._partial is None
            and (self._naming is None or not self._naming.search(chunk))
            and not self.ending
            and not self._cut_newline
            and chunk.endswith(b"\n\n")
            and not self._marked(chunk)
        )

    def finishing(self) -> Generator[None, None, None]:
        """Note that the upstream has sent everything. A last event without its empty line counts,
        what arrived of one that is cut off as well, and fewer images than were asked for are
        complete, unless one is cut off."""
        is_cut = False
        if self._partial is not None and not self.ended:
            answer = yield from self._partial.torn()
            if answer and self._partial.is_cut:
                is_cut = True
                yield from self._take_torn(answer)
            else:
                rest: list[bytes] = []
                yield from self._complete(b"", rest)
                self._waiting += b"".join(rest)
        self.ended = self.ended or self.ending or (self._ends_seen > 0 and not is_cut)

    def tearing(self) -> Generator[None, None, None]:
        answer = (yield from self._partial.torn()) if self._partial else None
        if answer:
            yield from self._take_torn(answer)

    def _take_torn(self, answer: Answer) -> Generator[None, None, None]:
        """Take in, once, what arrived of an event that was cut off."""
        self._partial = None
        self.report.passed.see_delta(answer, self._chat)
        yield from self.report.note(answer, torn=True)

    def rest(self) -> bytes:
        waiting = self._waiting + self._held
        self._waiting = self._held = b""
        return waiting

    def count_text(self, events: bytes) -> None:
        """For an estimate."""
        for text in self._text.findall(events):
            self.report.passed.deltas += len(text)

    def _complete(self, segment: bytes, passed: list[bytes]) -> Generator[None, None, None]:
        """The event that `segment` ends is whole: judge it."""
        event, begun = self._partial, self._begun
        if event is not None:
            yield from event.steps(segment)
        self._partial, self._tail, self._begun = None, b"", False
        self.at_once = MAX_AT_ONCE
        verdict = "pass"
        held, self._held = self._held + segment, b""
        if not self.ended:
            verdict = yield from self._judge(event, segment)
            self._go_on(event.start if event else segment, len(held), passed)
            if begun and verdict == "take out":  # too late for that
                verdict = "pass"
            if verdict == "last":
                self.ending, verdict = True, "pass"
            self.ended = self.ending and not self._expects_more()
            self._cut_newline = verdict if held.endswith(b"\r") else ""
        if verdict == "pass":
            self._pass(held, passed)

    def _pass(self, held: bytes, passed: list[bytes]) -> None:
        """Send on, or let wait for the row what comes from the event on that ends the answer."""
        if self.ending:
            self._waiting += held
        else:
            passed.append(held)

    def _go_on(self, start: bytes, size: int, passed: list[bytes]) -> None:
        """After an event that seemed to end a stream of pictures, another event with this start has
        come, of `size` bytes so far. If it is a picture, and too large to be held back, the stream
        goes on: send on what was held back."""
        too_large = self._images and len(self._waiting) + size > HOLD
        if self.ending and too_large and PICTURE.search(start[:START]):
            passed.append(self._waiting)
            self.ending, self._waiting = False, b""

    def _expects_more(self) -> bool:
        """Whether more usage may follow the event that ends the answer. A picture is not the last
        one before the stream ends."""
        report = self.report
        expected = self._expects_usage and not (report.usage or report.failed)
        # What is taken for the end can be HOLD bytes itself; as much may follow.
        return (self._images or expected) and len(self._waiting) <= 2 * HOLD

    def _grow(self, chunk: bytes, passed: list[bytes]) -> Generator[None, None, None]:
        """The incomplete event grows. Send on what can't turn out to matter."""
        if self.ended:
            self._held += chunk
            return
        if self._partial is None:
            self._partial = EventText()
        yield from self._partial.steps(chunk)
        if self._partial.is_long:
            self.at_once = 0
        self._tail = (self._tail + chunk)[-2:]
        self._held += chunk
        self._go_on(self._partial.start, len(self._held), passed)
        if self.ending:
            self.ended = len(self._held) > HOLD
            return
        keep = 0
        if self._may_matter(self._partial.start):
            keep = len(self._held) if len(self._held) <= HOLD else HOLD_BACK
        sent = len(self._held) - keep
        self._begun = self._begun or sent > 0
        passed.append(self._held[:sent])
        self._held = self._held[sent:]

    def _may_matter(self, start: bytes) -> bool:
        """Whether an event that starts so may end the answer, or may have to be taken out."""
        start = start.removeprefix(BYTE_ORDER_MARK).lstrip(b"\r\n")
        if self._chat:
            return self._take_out_usage or not CHAT_CHUNK.match(start)
        named = EVENT_TYPE.match(start)
        return not named or bool(LAST.fullmatch(named[1] or named[2] or b""))

    def _judge(self, event: EventText | None, segment: bytes) -> Generator[None, None, str]:
        """Return 'pass', 'last', or 'take out' for an event, which is all in `segment` if it did
        not come in parts."""
        if event is not None and event.is_large:
            answer = yield from event.answer()
            if answer:
                self.report.passed.see_delta(answer, self._chat)
            return (yield from self._note(answer))
        whole = event.whole() if event else segment
        self.count_text(whole)
        if not self._marked(whole) and not (self._naming and self._naming.search(whole)):
            return "pass"
        data = data_of(whole)
        if not data:
            return "pass"
        if data.strip() == b"[DONE]":
            return "last"
        return (yield from self._note((yield from answer_steps(data))))

    def _note(self, answer: Answer | None) -> Generator[None, None, str]:
        """Take in what an event says."""
        if answer is None:
            return "pass"
        report = self.report
        yield from report.note(answer)
        # If text has passed since output was reported, this usage has none of its own.
        if self._chat and isinstance(answer.usage, dict) and not report.is_outdated:
            report.is_of_choices = has_choices(answer)
        if self._naming:
            self._naming = NAMING[report.response_id is None, report.model is None]
        if isinstance(answer.type, str) and LAST.fullmatch(answer.type.encode()):
            self._ends_seen += not self._chat
            return "last" if self._ends_seen >= self._ends else "pass"
        return "take out" if self._take_out_usage and is_usage_chunk(answer) else "pass"


def is_usage_chunk(answer: Answer) -> bool:
    """Whether a chat's chunk is the one that only reports the usage."""
    return isinstance(answer.usage, dict) and not has_choices(answer) and not answer.error
