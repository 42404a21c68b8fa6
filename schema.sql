-- The tables of a gateway's database. The gateway runs this file by itself: every section whose
-- number is above the database's `PRAGMA user_version`, in order, each in one transaction. A section
-- that has been released is never edited; what changes is a new section below it.
--
-- Times are milliseconds since 1970-01-01T00:00:00Z, counts are integers, nothing is REAL.

-- version 1

CREATE TABLE accounts (
    id                  TEXT PRIMARY KEY,       -- acct_ and 16 hexadecimal digits
    name                TEXT NOT NULL UNIQUE    -- what people call it, in commands and reports
                        CHECK (length(name) BETWEEN 1 AND 100),
    email               TEXT,                   -- whom to write to
    status              TEXT NOT NULL DEFAULT 'active' CHECK (status IN ('active', 'suspended')),
    status_reason       TEXT,                   -- why it is suspended
    concurrency         INTEGER CHECK (concurrency >= 0),          -- its own limits; NULL: those of
    requests_per_minute INTEGER CHECK (requests_per_minute >= 0),  -- [limits.account] in the
    tokens_per_minute   INTEGER CHECK (tokens_per_minute >= 0),    -- settings; 0: none
    created_at          INTEGER NOT NULL
) STRICT;

CREATE TABLE keys (
    id                  TEXT PRIMARY KEY,       -- key_ and 16 hexadecimal digits
    hash                BLOB NOT NULL UNIQUE CHECK (length(hash) = 32),  -- SHA-256 of the whole key
    account_id          TEXT NOT NULL REFERENCES accounts (id),
    label               TEXT NOT NULL DEFAULT '',   -- what its owner calls it
    concurrency         INTEGER CHECK (concurrency >= 0),          -- limits beside its account's;
    requests_per_minute INTEGER CHECK (requests_per_minute >= 0),  -- NULL or 0: none
    tokens_per_minute   INTEGER CHECK (tokens_per_minute >= 0),
    created_at          INTEGER NOT NULL,
    expires_at          INTEGER,                -- refused from this instant; NULL: never
    revoked_at          INTEGER                 -- refused once this is set
) STRICT;

CREATE INDEX keys_of_an_account ON keys (account_id);

-- One row for each request that left for an upstream: written as 'pending' before it leaves,
-- settled before its last bytes reach the client. Never deleted, never settled twice.
CREATE TABLE requests (
    request_id          TEXT PRIMARY KEY,       -- req_, 12 hexadecimal digits of time, 20 of chance
    account_id          TEXT NOT NULL REFERENCES accounts (id),
    key_id              TEXT NOT NULL REFERENCES keys (id),
    endpoint            TEXT NOT NULL,          -- the route, such as /v1/responses
    model               TEXT,                   -- as the upstream named it in its answer
    requested_model     TEXT NOT NULL,          -- as the client named it
    upstream            TEXT NOT NULL,          -- the name of the upstream in the settings
    started_at          INTEGER NOT NULL,       -- when the request's head had arrived
    first_byte_ms       INTEGER,                -- from then to the upstream's first byte of a body
    duration_ms         INTEGER,                -- from then to the upstream's last byte
    status              INTEGER,                -- the HTTP status given to the client
    outcome             TEXT NOT NULL CHECK (outcome IN ('pending', 'completed', 'upstream_error',
                            'upstream_failed', 'client_disconnected', 'interrupted')),
    usage_source        TEXT NOT NULL CHECK (usage_source IN ('upstream', 'estimated', 'none')),
    input_tokens        INTEGER CHECK (input_tokens >= 0),        -- NULL: nobody reported it
    cached_input_tokens INTEGER CHECK (cached_input_tokens >= 0), -- part of input_tokens
    cache_write_tokens  INTEGER CHECK (cache_write_tokens >= 0),  -- part of input_tokens
    output_tokens       INTEGER CHECK (output_tokens >= 0),
    reasoning_tokens    INTEGER CHECK (reasoning_tokens >= 0),    -- part of output_tokens
    image_input_tokens  INTEGER CHECK (image_input_tokens >= 0),
    image_output_tokens INTEGER CHECK (image_output_tokens >= 0),
    web_searches        INTEGER CHECK (web_searches >= 0),
    service_tier        TEXT,                   -- as the upstream reported it
    response_id         TEXT                    -- the id in the upstream's answer
) STRICT, WITHOUT ROWID;

CREATE INDEX requests_by_time ON requests (started_at);
CREATE INDEX requests_of_an_account ON requests (account_id, started_at);
CREATE INDEX requests_in_flight ON requests (request_id) WHERE outcome = 'pending';

-- What the gateway writes to learn whether the ledger can commit.
CREATE TABLE heartbeat (
    id      INTEGER PRIMARY KEY CHECK (id = 1),
    beat_at INTEGER NOT NULL
) STRICT;
