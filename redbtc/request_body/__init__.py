r"""Read what the gateway must know of a request's body: a few facts, and the stored objects that
it names.

Rule 1. The body is kept once, as it came, and never re-encoded. Of JSON the facts are read and
nothing else is built. Of a form the short fields are read as it arrives. A compressed body has a
decoded copy of bounded size beside it, made only to be read.

Rule 2. A body may name only stored objects of its own account, since all accounts share the
upstream's key. Members that name an object are found by the text of their names, wherever they are:
within a JSON string a quote is escaped, so text that looks like a member's name is one. If there is
any, it is judged by its place, since metadata, schemas and arguments are free text of their
authors. The result is a list of references. Its user knows the owners of objects; what is not known
to be the account's own is refused.

Rule 3. A body has one meaning. What two readers could read in different ways is refused: a
duplicate key, a name that contains escapes or look-alike letters, a form with a doubtful boundary
or part. Otherwise the gateway would check one meaning and the upstream act on another.

Rule 4. A body is parsed on the event loop that all requests share, and before the limits that
depend on its contents can refuse it. So all parsing is a generator of small steps
(redbtc/slices.py), no step calls msgspec or re on more than a piece of the text (pieces.py), and
everything that can be repeated has a maximum far above legitimate use.

An example. Take this body of a request to /v1/responses:

    {"model": "gpt-5.5", "stream": true, "previous_response_id": "resp_1",
     "input": [{"type": "message", "id": "msg_a", "role": "user",
                "content": "\"file_id\": \"x\""},
               {"type": "web_search_call", "id": "ws_2", "action": {"type": "search"}},
               {"type": "item_reference", "id": "rs_3"}],
     "tools": [{"type": "file_search", "vector_store_ids": ["vs_4"]},
               {"type": "function", "name": "f",
                "parameters": {"properties": {"file_id": {}}}}],
     "metadata": {"conversation": "conv_5"}}

1. The text is shorter than MAX_PIECE, so it is one piece (pieces.py). strict_json.py reads it as a
   dict from each member's name to the text of its value. If the object, written without white
   space and with each name once, would be as long as the text is, it has no room for a duplicate
   key. Here there is white space, so its members are walked through one by one (`check_once`).
2. facts.py decodes the facts from the members that are facts: `model` and `stream`.
3. reading.py searches the text for the members that can name an object (references.MEMBER), and
   finds `previous_response_id`, the type "item_reference", `vector_store_ids`, `file_id` in the
   schema, and `conversation`. The quotes in the message's content are escaped, so that is no
   member. Most bodies have no match, and their members are not searched any further
   (member_references.py).
4. The items of the input are read one by one (reading.py). Each item with an `id` is judged by its
   type. A message is complete without a look-up, so the client may choose the id "msg_a". Only a
   tool of the upstream makes a search, so "ws_2" is a reference. So is "rs_3", an item that is
   nothing but an id.
5. The tools are read one by one (tools.py). The first can use the extra `file_search`, which needs
   a rate in the price. Its `vector_store_ids` is a reference to "vs_4". The `parameters` of the
   second are a schema, so `file_id` in it is free text.
6. Of the other members, `metadata` is free text, so "conv_5" is no reference, and
   `previous_response_id` is a reference to "resp_1".

The references are resp_1, ws_2, rs_3 and vs_4. The gateway refuses the request with a 400 or 404
unless all four belong to the account. Some variants are refused earlier:

- `"model"` is there twice: "Duplicate key in the JSON body."
- `"Model"` in place of `"model"`: "The key 'Model' must be written 'model'."
- `"previous_respons\u0065_id"`: "The name 'previous_response_id' contains escapes or look-alike
  characters. Write it in plain ASCII." A search for the text of the name would miss it.
- `"conversation"` outside of `metadata`: no error here, but a fifth reference.
"""
