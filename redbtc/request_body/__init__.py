"""What the gateway must know of a request's body: a few facts, and the stored objects it names.

Rule 1. The body is held once, as it came, and never re-encoded. Of JSON the facts are read and
nothing else is built; of a form the short fields, as it arrives; a compressed body has a decoded
copy of bounded size beside it, made only to be read.

Rule 2. All accounts share the upstream's key, so a body may name no stored object of another. Names
of members that refer to one are found wherever they stand, by their text: within a JSON string a
quote is escaped, so what looks like a member's name is one. Where there is any, it is looked at by
its place: metadata, schemas and arguments are somebody's own words. What comes out is a list of
references; whoever asks for it knows whose they are. What isn't known to be the account's own is
refused.

Rule 3. A body has one meaning. What the next reader could take in another way is refused: a member
that stands twice, a name behind escapes or in other letters, a form whose boundary or heads are in
doubt. Else what is checked here would not be what the upstream does.

Rule 4. A body is parsed on the event loop that all requests share, and before the limits that
depend on its contents can refuse it. So all parsing is a generator of small steps
(redbtc/slices.py), no step calls msgspec or re on more than a piece of the text (pieces.py), and
everything that can be repeated has a maximum far above legitimate use.
"""
