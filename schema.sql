-- The tables of a gateway's database. The gateway executes this file by itself: every section whose
-- number is above the database's `PRAGMA user_version`, in order, each in one transaction. The SQL
-- of a released section is never edited; a change is a new section above "-- triggers".
--
-- Times are milliseconds since 1970-01-01T00:00:00Z, counts are integers, nothing is REAL.

-- version 1

CREATE TABLE accounts (
    id                  TEXT PRIMARY KEY,       -- acct_ and 16 hexadecimal digits
    name                TEXT NOT NULL UNIQUE    -- its name in commands and reports
                        CHECK (length(name) BETWEEN 1 AND 100),
    email               TEXT,                   -- contact address
    status              TEXT NOT NULL DEFAULT 'active' CHECK (status IN ('active', 'suspended')),
    status_reason       TEXT,                   -- why it is suspended
    concurrency         INTEGER CHECK (concurrency >= 0),          -- its limits; NULL: those of
    requests_per_minute INTEGER CHECK (requests_per_minute >= 0),  -- [limits.account] in the
    tokens_per_minute   INTEGER CHECK (tokens_per_minute >= 0),    -- settings; 0: no limit
    created_at          INTEGER NOT NULL
) STRICT;

CREATE TABLE keys (
    id                  TEXT PRIMARY KEY,       -- key_ and 16 hexadecimal digits
    hash                BLOB NOT NULL UNIQUE CHECK (length(hash) = 32),  -- SHA-256 of the whole key
    account_id          TEXT NOT NULL REFERENCES accounts (id),
    label               TEXT NOT NULL DEFAULT '',   -- the owner's name for it
    concurrency         INTEGER CHECK (concurrency >= 0),          -- in addition to the account's limits;
    requests_per_minute INTEGER CHECK (requests_per_minute >= 0),  -- NULL or 0: no limit
    tokens_per_minute   INTEGER CHECK (tokens_per_minute >= 0),
    created_at          INTEGER NOT NULL,
    expires_at          INTEGER,                -- refused from this instant; NULL: never
    revoked_at          INTEGER                 -- refused once this is set
) STRICT;

CREATE INDEX keys_of_an_account ON keys (account_id);

-- One row for each request that was sent to an upstream: written as 'pending' before it is sent,
-- settled before its last bytes reach the client. A settled row is never deleted or settled again.
CREATE TABLE requests (
    request_id          TEXT PRIMARY KEY,       -- req_, 12 hexadecimal digits of time, 20 of chance
    account_id          TEXT NOT NULL REFERENCES accounts (id),
    key_id              TEXT NOT NULL REFERENCES keys (id),
    endpoint            TEXT NOT NULL,          -- the route, such as /v1/responses
    model               TEXT,                   -- as the upstream named it in its answer
    requested_model     TEXT NOT NULL,          -- as the client named it
    upstream            TEXT NOT NULL,          -- the name of the upstream in the settings
    started_at          INTEGER NOT NULL,       -- when the request's head had been received
    first_byte_ms       INTEGER,                -- from then to the first byte of the upstream's body
    duration_ms         INTEGER,                -- from then to the last byte of the upstream's body
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

-- One row, which the gateway writes to find out whether the ledger can commit.
CREATE TABLE heartbeat (
    id      INTEGER PRIMARY KEY CHECK (id = 1),
    beat_at INTEGER NOT NULL
) STRICT;

-- version 2
--
-- Amounts are integers of nanos (billionths of the currency's unit); prices are nanos per million
-- tokens. Sums and payments are stored as whole units and the remaining nanos in two columns, since a
-- sum of nanos can be too large for an INTEGER.

ALTER TABLE accounts ADD COLUMN
    credit_limit        INTEGER CHECK (credit_limit >= -1);     -- how far below zero the balance may go;
                                                -- -1: unlimited; NULL: billing.default_credit_limit
ALTER TABLE accounts ADD COLUMN
    monthly_budget      INTEGER CHECK (monthly_budget >= 0);    -- for a calendar month (UTC); NULL: no budget
ALTER TABLE keys ADD COLUMN
    monthly_budget      INTEGER CHECK (monthly_budget >= 0);    -- the same, for this key alone
ALTER TABLE requests ADD COLUMN
    price_id            INTEGER REFERENCES prices (id);         -- the price it was billed by; NULL: not billed
ALTER TABLE requests ADD COLUMN
    cost                INTEGER CHECK (cost >= 0);  -- nanos; NULL: unknown, since no usage was reported
ALTER TABLE requests ADD COLUMN
    month               TEXT;                   -- the statement it is on, such as 2026-11: the month in which it ended

-- What a model costs from an instant on. Rows are only ever added. For each pattern, tier and
-- threshold, the row in force is the one with the latest effective_at that is not in the future.
CREATE TABLE prices (
    id                  INTEGER PRIMARY KEY,
    model               TEXT NOT NULL,          -- a name or shell pattern; the most specific matching one wins
    tier                TEXT NOT NULL,          -- the service tier that the response reports
    above_input_tokens  INTEGER NOT NULL CHECK (above_input_tokens >= 0),  -- for requests with more input
    effective_at        INTEGER NOT NULL,
    input               INTEGER CHECK (input >= 0),         -- NULL: 0
    cached_input        INTEGER CHECK (cached_input >= 0),  -- NULL: as input
    cache_write         INTEGER CHECK (cache_write >= 0),   -- NULL: as input
    output              INTEGER CHECK (output >= 0),        -- NULL: 0
    image_input         INTEGER CHECK (image_input >= 0),   -- NULL: as input
    image_output        INTEGER CHECK (image_output >= 0),  -- NULL: as output
    web_search          INTEGER CHECK (web_search >= 0),    -- per call, not per million; NULL: 0
    max_output_tokens   INTEGER CHECK (max_output_tokens > 0),  -- the model's maximum output, if known
    currency            TEXT NOT NULL,
    source              TEXT,                   -- where the price was published
    created_at          INTEGER NOT NULL,
    added_by            TEXT,                   -- who added it
    reason              TEXT                    -- why an increase skipped the notice period
) STRICT;

CREATE TABLE payments (
    id                  TEXT PRIMARY KEY,       -- pay_ and 16 hexadecimal digits
    account_id          TEXT NOT NULL REFERENCES accounts (id),
    units               INTEGER NOT NULL,       -- -1.5 is -2 units and 500,000,000 nanos
    nanos               INTEGER NOT NULL CHECK (nanos BETWEEN 0 AND 999999999),
    currency            TEXT NOT NULL,
    reference           TEXT,                   -- the payer's; a repeated one is ignored
    reason              TEXT CHECK (units >= 0 OR reason IS NOT NULL),  -- required for a refund or correction
    month               TEXT NOT NULL,          -- the statement it is on
    created_at          INTEGER NOT NULL,
    added_by            TEXT
) STRICT;

CREATE UNIQUE INDEX payments_by_reference ON payments (account_id, reference);
CREATE INDEX payments_of_an_account ON payments (account_id, month);

-- Notices for all accounts or for one.
CREATE TABLE notices (
    id                  TEXT PRIMARY KEY,       -- ntc_ and 16 hexadecimal digits
    kind                TEXT NOT NULL
                        CHECK (kind IN ('price', 'terms', 'maintenance', 'incident', 'budget')),
    account_id          TEXT REFERENCES accounts (id),  -- NULL: for all
    key_id              TEXT REFERENCES keys (id),      -- the key whose budget it is; NULL: the account's budget
    month               TEXT,                   -- of the budget
    percent             INTEGER,                -- of the budget that is spent
    text                TEXT NOT NULL,
    effective_at        INTEGER NOT NULL,       -- what it announces begins then
    until               INTEGER,                -- and ends then; NULL: no end
    created_at          INTEGER NOT NULL,
    added_by            TEXT,
    withdrawn_at        INTEGER,
    delivered_at        INTEGER                 -- when the webhook accepted it
) STRICT;

CREATE UNIQUE INDEX budget_notices ON notices (account_id, ifnull(key_id, ''), month, percent)
    WHERE kind = 'budget';

-- Sums of the settled requests, kept by the triggers below in the transaction that settles a request.
CREATE TABLE usage_by_day (
    account_id          TEXT NOT NULL,
    month               TEXT NOT NULL,          -- the month of the statement
    day                 INTEGER NOT NULL,       -- on which the requests started, in days since 1970
    model               TEXT NOT NULL,          -- as the upstream named it, else as the client did
    requested_model     TEXT NOT NULL,
    key_id              TEXT NOT NULL,
    requests            INTEGER NOT NULL,
    estimated           INTEGER NOT NULL,       -- those with estimated usage
    unreported          INTEGER NOT NULL,       -- those without usage
    input_tokens        INTEGER,                -- sums; NULL: no request has a number
    cached_input_tokens INTEGER,
    cache_write_tokens  INTEGER,
    output_tokens       INTEGER,
    reasoning_tokens    INTEGER,
    image_input_tokens  INTEGER,
    image_output_tokens INTEGER,
    web_searches        INTEGER,
    cost_units          INTEGER NOT NULL,
    cost_nanos          INTEGER NOT NULL,
    PRIMARY KEY (day, account_id, month, model, requested_model, key_id)
) STRICT, WITHOUT ROWID;

CREATE INDEX usage_of_an_account ON usage_by_day (account_id, month);

INSERT INTO usage_by_day (
        account_id, month, day, model, requested_model, key_id, requests, estimated, unreported,
        input_tokens, cached_input_tokens, cache_write_tokens, output_tokens, reasoning_tokens,
        image_input_tokens, image_output_tokens, web_searches, cost_units, cost_nanos)
    SELECT account_id, strftime('%Y-%m', started_at / 1000, 'unixepoch'), started_at / 86400000,
           ifnull(model, requested_model), requested_model, key_id, count(*),
           sum(usage_source = 'estimated'), sum(usage_source = 'none'), sum(input_tokens),
           sum(cached_input_tokens), sum(cache_write_tokens), sum(output_tokens),
           sum(reasoning_tokens), sum(image_input_tokens), sum(image_output_tokens),
           sum(web_searches), 0, 0
      FROM requests WHERE outcome <> 'pending' GROUP BY 1, 2, 3, 4, 5, 6;

CREATE TRIGGER a_request_is_settled AFTER UPDATE OF outcome ON requests
WHEN OLD.outcome = 'pending' AND NEW.outcome <> 'pending' BEGIN
    INSERT INTO usage_by_day VALUES (
        NEW.account_id, NEW.month, NEW.started_at / 86400000,
        ifnull(NEW.model, NEW.requested_model), NEW.requested_model, NEW.key_id, 1,
        NEW.usage_source = 'estimated', NEW.usage_source = 'none', NEW.input_tokens,
        NEW.cached_input_tokens, NEW.cache_write_tokens, NEW.output_tokens, NEW.reasoning_tokens,
        NEW.image_input_tokens, NEW.image_output_tokens, NEW.web_searches,
        ifnull(NEW.cost / 1000000000, 0), ifnull(NEW.cost % 1000000000, 0))
    ON CONFLICT DO UPDATE SET
        requests = requests + 1,
        estimated = estimated + excluded.estimated,
        unreported = unreported + excluded.unreported,
        input_tokens = coalesce(
            input_tokens + excluded.input_tokens, input_tokens, excluded.input_tokens),
        cached_input_tokens = coalesce(
            cached_input_tokens + excluded.cached_input_tokens, cached_input_tokens, excluded.cached_input_tokens),
        cache_write_tokens = coalesce(
            cache_write_tokens + excluded.cache_write_tokens, cache_write_tokens, excluded.cache_write_tokens),
        output_tokens = coalesce(
            output_tokens + excluded.output_tokens, output_tokens, excluded.output_tokens),
        reasoning_tokens = coalesce(
            reasoning_tokens + excluded.reasoning_tokens, reasoning_tokens, excluded.reasoning_tokens),
        image_input_tokens = coalesce(
            image_input_tokens + excluded.image_input_tokens, image_input_tokens, excluded.image_input_tokens),
        image_output_tokens = coalesce(
            image_output_tokens + excluded.image_output_tokens, image_output_tokens, excluded.image_output_tokens),
        web_searches = coalesce(
            web_searches + excluded.web_searches, web_searches, excluded.web_searches),
        cost_units = cost_units + excluded.cost_units,
        cost_nanos = cost_nanos + excluded.cost_nanos;
END;

-- A row that is inserted already settled becomes pending first, so that the trigger above counts it.
CREATE TRIGGER a_request_comes_settled AFTER INSERT ON requests
WHEN NEW.outcome <> 'pending' BEGIN
    UPDATE requests SET outcome = 'pending' WHERE request_id = NEW.request_id;
    UPDATE requests SET outcome = NEW.outcome WHERE request_id = NEW.request_id;
END;

-- Nothing that money depends on may be changed or deleted.
CREATE TRIGGER settled_is_settled BEFORE UPDATE OF account_id, cost, month, price_id ON requests
WHEN OLD.outcome <> 'pending' BEGIN SELECT RAISE(ABORT, 'a settled request can''t be changed'); END;
CREATE TRIGGER prices_stay BEFORE UPDATE ON prices
BEGIN SELECT RAISE(ABORT, 'a price can''t be changed, only superseded'); END;
CREATE TRIGGER prices_are_kept BEFORE DELETE ON prices
BEGIN SELECT RAISE(ABORT, 'a price can''t be deleted, only superseded'); END;
CREATE TRIGGER payments_stay BEFORE UPDATE ON payments
BEGIN SELECT RAISE(ABORT, 'a payment can''t be changed, only corrected by another'); END;
CREATE TRIGGER payments_are_kept BEFORE DELETE ON payments
BEGIN SELECT RAISE(ABORT, 'a payment can''t be deleted, only corrected by another'); END;

-- version 3

ALTER TABLE keys ADD COLUMN
    models              TEXT;                   -- shell patterns, separated by commas; NULL: all models
ALTER TABLE requests ADD COLUMN
    tool_input_tokens   INTEGER CHECK (tool_input_tokens >= 0);  -- text that a tool's own model read; not
                                                -- part of input_tokens
ALTER TABLE usage_by_day ADD COLUMN tool_input_tokens INTEGER;

-- Which account owns each object that an upstream stores: all accounts share the upstream's key.
CREATE TABLE stored_objects (
    id                  TEXT PRIMARY KEY,       -- the id of a response, an item of its output or listed
                                                -- input, a container or a file in it, a conversation:
                                                -- as the upstream named it
    account_id          TEXT NOT NULL REFERENCES accounts (id),
    upstream            TEXT NOT NULL,          -- where it is stored
    created_at          INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

-- Background responses whose end has not been seen. Their rows in `requests` are pending, and the
-- next start does not mark them as interrupted.
CREATE TABLE background (
    request_id          TEXT PRIMARY KEY REFERENCES requests (request_id),
    admitted_at         INTEGER NOT NULL,       -- ledger time; the prices of that time apply
    held                INTEGER NOT NULL,       -- nanos, until it ends
    input_estimate      INTEGER NOT NULL,       -- tokens, used if none are reported
    image_model         TEXT NOT NULL           -- the model of the request's image tool
) STRICT, WITHOUT ROWID;

DROP TRIGGER a_request_is_settled;
CREATE TRIGGER a_request_is_settled AFTER UPDATE OF outcome ON requests
WHEN OLD.outcome = 'pending' AND NEW.outcome <> 'pending' BEGIN
    INSERT INTO usage_by_day VALUES (
        NEW.account_id, NEW.month, NEW.started_at / 86400000,
        ifnull(NEW.model, NEW.requested_model), NEW.requested_model, NEW.key_id, 1,
        NEW.usage_source = 'estimated', NEW.usage_source = 'none', NEW.input_tokens,
        NEW.cached_input_tokens, NEW.cache_write_tokens, NEW.output_tokens, NEW.reasoning_tokens,
        NEW.image_input_tokens, NEW.image_output_tokens, NEW.web_searches,
        ifnull(NEW.cost / 1000000000, 0), ifnull(NEW.cost % 1000000000, 0),
        NEW.tool_input_tokens)
    ON CONFLICT DO UPDATE SET
        requests = requests + 1,
        estimated = estimated + excluded.estimated,
        unreported = unreported + excluded.unreported,
        input_tokens = coalesce(
            input_tokens + excluded.input_tokens, input_tokens, excluded.input_tokens),
        cached_input_tokens = coalesce(
            cached_input_tokens + excluded.cached_input_tokens, cached_input_tokens, excluded.cached_input_tokens),
        cache_write_tokens = coalesce(
            cache_write_tokens + excluded.cache_write_tokens, cache_write_tokens, excluded.cache_write_tokens),
        output_tokens = coalesce(
            output_tokens + excluded.output_tokens, output_tokens, excluded.output_tokens),
        reasoning_tokens = coalesce(
            reasoning_tokens + excluded.reasoning_tokens, reasoning_tokens, excluded.reasoning_tokens),
        image_input_tokens = coalesce(
            image_input_tokens + excluded.image_input_tokens, image_input_tokens, excluded.image_input_tokens),
        image_output_tokens = coalesce(
            image_output_tokens + excluded.image_output_tokens, image_output_tokens, excluded.image_output_tokens),
        web_searches = coalesce(
            web_searches + excluded.web_searches, web_searches, excluded.web_searches),
        tool_input_tokens = coalesce(
            tool_input_tokens + excluded.tool_input_tokens, tool_input_tokens, excluded.tool_input_tokens),
        cost_units = cost_units + excluded.cost_units,
        cost_nanos = cost_nanos + excluded.cost_nanos;
END;

-- version 4

ALTER TABLE background ADD COLUMN
    text_bytes          INTEGER NOT NULL DEFAULT 0 CHECK (text_bytes >= 0);  -- output that was sent to the
                                                -- client, for an estimate if it is cancelled
ALTER TABLE stored_objects ADD COLUMN
    models              TEXT;                   -- further models that work in what builds on it, as JSON:
                                                -- {"gpt-image-2": true}, true for pictures; NULL: none

-- version 5

ALTER TABLE accounts ADD COLUMN
    throttle_factor     INTEGER CHECK (throttle_factor BETWEEN 1 AND 999);  -- thousandths of its limits
                                                -- that apply; NULL: no throttle
ALTER TABLE accounts ADD COLUMN
    throttled_until     INTEGER;                -- NULL: until the throttle is removed
ALTER TABLE keys ADD COLUMN
    compromised         INTEGER NOT NULL DEFAULT 0 CHECK (compromised IN (0, 1));  -- 1: it was leaked
ALTER TABLE notices ADD COLUMN
    refuses_requests    INTEGER NOT NULL DEFAULT 0  -- 1: new requests are refused while it lasts
                        CHECK (refuses_requests = 0 OR kind = 'maintenance');

-- Users of the dashboard: operators, and the members of accounts. The same address in two accounts
-- is two separate users.
CREATE TABLE users (
    id                  TEXT PRIMARY KEY,       -- usr_ and 16 hexadecimal digits
    email               TEXT NOT NULL CHECK (email = lower(email)),
    role                TEXT NOT NULL CHECK (role IN ('operator', 'owner', 'viewer')),
    account_id          TEXT REFERENCES accounts (id)
                        CHECK ((account_id IS NULL) = (role = 'operator')),
    salt                BLOB NOT NULL CHECK (length(salt) = 16),    -- the same for all users of an address
    password            BLOB CHECK (length(password) = 32),         -- scrypt hash; NULL: not set yet
    password_set_at     INTEGER,
    link                BLOB UNIQUE CHECK (length(link) = 32),      -- SHA-256 of a one-time link's secret
    link_expires_at     INTEGER,
    created_at          INTEGER NOT NULL
) STRICT;

CREATE UNIQUE INDEX users_by_email ON users (email, ifnull(account_id, ''));
CREATE INDEX users_of_an_account ON users (account_id);

CREATE TABLE sessions (
    id                  TEXT PRIMARY KEY,       -- ses_ and 16 hexadecimal digits; not a secret
    hash                BLOB NOT NULL UNIQUE CHECK (length(hash) = 32),  -- SHA-256 of the cookie
    user_id             TEXT NOT NULL REFERENCES users (id) ON DELETE CASCADE,
    browser             TEXT NOT NULL,          -- its User-Agent, shortened
    created_at          INTEGER NOT NULL,
    seen_at             INTEGER NOT NULL        -- to the minute
) STRICT;

CREATE INDEX sessions_of_a_user ON sessions (user_id);

-- Browsers in which somebody has logged in.
CREATE TABLE known_browsers (
    hash                BLOB PRIMARY KEY CHECK (length(hash) = 32),  -- SHA-256 of the cookie
    user_id             TEXT NOT NULL REFERENCES users (id) ON DELETE CASCADE,
    created_at          INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

CREATE INDEX known_browsers_of_a_user ON known_browsers (user_id);

-- The log of administrative changes, written by the triggers below in the transaction of the change.
CREATE TABLE changes (
    id                  INTEGER PRIMARY KEY,
    changed_at          INTEGER NOT NULL,
    changed_by          TEXT NOT NULL,
    kind                TEXT NOT NULL
                        CHECK (kind IN ('account', 'key', 'price', 'payment', 'notice', 'user')),
    object_id           TEXT NOT NULL,
    account_id          TEXT,                   -- the account it belongs to
    before              TEXT,                   -- the columns as JSON; NULL: it was added
    after               TEXT                    -- NULL: it was removed
) STRICT;

CREATE INDEX changes_of_an_account ON changes (account_id, id);

-- Who makes the changes of this transaction. Empty outside a transaction, so that no change can be
-- made without a name.
CREATE TABLE acting (
    id                  INTEGER PRIMARY KEY CHECK (id = 1),
    name                TEXT NOT NULL,
    at                  INTEGER NOT NULL
) STRICT;

CREATE TRIGGER changes_stay BEFORE UPDATE ON changes
BEGIN SELECT RAISE(ABORT, 'the log of changes is only ever added to'); END;
CREATE TRIGGER changes_are_kept BEFORE DELETE ON changes
BEGIN SELECT RAISE(ABORT, 'the log of changes is only ever added to'); END;

CREATE TRIGGER an_account_is_added AFTER INSERT ON accounts BEGIN
    INSERT INTO changes VALUES (NULL, (SELECT at FROM acting), (SELECT name FROM acting), 'account',
        NEW.id, NEW.id, NULL, json_object('name', NEW.name, 'email', NEW.email,
            'concurrency', NEW.concurrency, 'requests_per_minute', NEW.requests_per_minute,
            'tokens_per_minute', NEW.tokens_per_minute, 'credit_limit', NEW.credit_limit,
            'monthly_budget', NEW.monthly_budget));
END;
CREATE TRIGGER an_account_is_changed AFTER UPDATE ON accounts BEGIN
    INSERT INTO changes
        SELECT NULL, (SELECT at FROM acting), (SELECT name FROM acting), 'account', NEW.id, NEW.id,
               before, after
          FROM (SELECT json_object('name', OLD.name, 'email', OLD.email, 'status', OLD.status,
            'status_reason', OLD.status_reason, 'concurrency', OLD.concurrency,
            'requests_per_minute', OLD.requests_per_minute,
            'tokens_per_minute', OLD.tokens_per_minute, 'credit_limit', OLD.credit_limit,
            'monthly_budget', OLD.monthly_budget, 'throttle_factor', OLD.throttle_factor,
            'throttled_until', OLD.throttled_until) AS before,
        json_object('name', NEW.name, 'email', NEW.email, 'status', NEW.status,
            'status_reason', NEW.status_reason, 'concurrency', NEW.concurrency,
            'requests_per_minute', NEW.requests_per_minute,
            'tokens_per_minute', NEW.tokens_per_minute, 'credit_limit', NEW.credit_limit,
            'monthly_budget', NEW.monthly_budget, 'throttle_factor', NEW.throttle_factor,
            'throttled_until', NEW.throttled_until) AS after)
         WHERE before <> after;
END;
CREATE TRIGGER a_key_is_added AFTER INSERT ON keys BEGIN
    INSERT INTO changes VALUES (NULL, (SELECT at FROM acting), (SELECT name FROM acting), 'key',
        NEW.id, NEW.account_id, NULL, json_object('label', NEW.label, 'models', NEW.models,
            'concurrency', NEW.concurrency, 'requests_per_minute', NEW.requests_per_minute,
            'tokens_per_minute', NEW.tokens_per_minute, 'monthly_budget', NEW.monthly_budget,
            'expires_at', NEW.expires_at));
END;
CREATE TRIGGER a_key_is_changed AFTER UPDATE ON keys BEGIN
    INSERT INTO changes
        SELECT NULL, (SELECT at FROM acting), (SELECT name FROM acting), 'key', NEW.id, NEW.account_id,
               before, after
          FROM (SELECT json_object('label', OLD.label, 'expires_at', OLD.expires_at,
            'revoked_at', OLD.revoked_at, 'compromised', OLD.compromised) AS before,
        json_object('label', NEW.label, 'expires_at', NEW.expires_at,
            'revoked_at', NEW.revoked_at, 'compromised', NEW.compromised) AS after)
         WHERE before <> after;
END;
CREATE TRIGGER a_price_is_added AFTER INSERT ON prices BEGIN
    INSERT INTO changes VALUES (NULL, (SELECT at FROM acting), (SELECT name FROM acting), 'price',
        NEW.id, NULL, NULL, json_object('model', NEW.model, 'tier', NEW.tier,
            'above_input_tokens', NEW.above_input_tokens, 'effective_at', NEW.effective_at,
            'input', NEW.input, 'cached_input', NEW.cached_input, 'cache_write', NEW.cache_write,
            'output', NEW.output, 'image_input', NEW.image_input,
            'image_output', NEW.image_output, 'web_search', NEW.web_search,
            'reason', NEW.reason));
END;
CREATE TRIGGER a_payment_is_added AFTER INSERT ON payments BEGIN
    INSERT INTO changes VALUES (NULL, (SELECT at FROM acting), (SELECT name FROM acting), 'payment',
        NEW.id, NEW.account_id, NULL, json_object('units', NEW.units, 'nanos', NEW.nanos,
            'currency', NEW.currency, 'reference', NEW.reference, 'reason', NEW.reason));
END;
CREATE TRIGGER a_notice_is_added AFTER INSERT ON notices WHEN NEW.kind <> 'budget' BEGIN
    INSERT INTO changes VALUES (NULL, (SELECT at FROM acting), (SELECT name FROM acting), 'notice',
        NEW.id, NEW.account_id, NULL, json_object('kind', NEW.kind, 'text', NEW.text,
            'effective_at', NEW.effective_at, 'until', NEW.until,
            'refuses_requests', NEW.refuses_requests));
END;
CREATE TRIGGER a_notice_is_withdrawn AFTER UPDATE OF withdrawn_at ON notices
WHEN OLD.withdrawn_at IS NULL AND NEW.withdrawn_at IS NOT NULL BEGIN
    INSERT INTO changes VALUES (NULL, (SELECT at FROM acting), (SELECT name FROM acting), 'notice',
        NEW.id, NEW.account_id, json_object('text', OLD.text, 'withdrawn_at', NULL),
        json_object('text', NEW.text, 'withdrawn_at', NEW.withdrawn_at));
END;
CREATE TRIGGER a_user_is_added AFTER INSERT ON users BEGIN
    INSERT INTO changes VALUES (NULL, (SELECT at FROM acting), (SELECT name FROM acting), 'user',
        NEW.id, NEW.account_id, NULL, json_object('email', NEW.email, 'role', NEW.role));
END;
CREATE TRIGGER a_user_is_changed AFTER UPDATE ON users BEGIN
    INSERT INTO changes
        SELECT NULL, (SELECT at FROM acting), (SELECT name FROM acting), 'user', NEW.id, NEW.account_id,
               before, after
          FROM (SELECT json_object('email', OLD.email, 'role', OLD.role, 'password_set_at', OLD.password_set_at,
            'link_expires_at', OLD.link_expires_at) AS before,
        json_object('email', NEW.email, 'role', NEW.role, 'password_set_at', NEW.password_set_at,
            'link_expires_at', NEW.link_expires_at) AS after)
         WHERE before <> after;
END;
CREATE TRIGGER a_user_is_removed AFTER DELETE ON users BEGIN
    INSERT INTO changes VALUES (NULL, (SELECT at FROM acting), (SELECT name FROM acting), 'user',
        OLD.id, OLD.account_id, json_object('email', OLD.email, 'role', OLD.role), NULL);
END;

-- Sums for the pages that show all accounts, kept in the same way as usage_by_day.
CREATE TABLE usage_by_month (
    account_id          TEXT NOT NULL,
    month               TEXT NOT NULL,          -- the month of the statement
    requests            INTEGER NOT NULL,
    input_tokens        INTEGER NOT NULL,
    output_tokens       INTEGER NOT NULL,
    cost_units          INTEGER NOT NULL,
    cost_nanos          INTEGER NOT NULL,
    PRIMARY KEY (account_id, month)
) STRICT, WITHOUT ROWID;

CREATE INDEX usage_of_a_month ON usage_by_month (month);

CREATE TABLE traffic_by_day (
    day                 INTEGER NOT NULL,       -- on which the requests started, in days since 1970
    upstream            TEXT NOT NULL,
    outcome             TEXT NOT NULL,
    requests            INTEGER NOT NULL,
    cost_units          INTEGER NOT NULL,
    cost_nanos          INTEGER NOT NULL,
    PRIMARY KEY (day, upstream, outcome)
) STRICT, WITHOUT ROWID;

INSERT INTO usage_by_month
    SELECT account_id, month, sum(requests), ifnull(sum(input_tokens), 0),
           ifnull(sum(output_tokens), 0), sum(cost_units), sum(cost_nanos)
      FROM usage_by_day GROUP BY account_id, month;
INSERT INTO traffic_by_day
    SELECT started_at / 86400000, upstream, outcome, count(*), sum(ifnull(cost / 1000000000, 0)),
           sum(ifnull(cost % 1000000000, 0))
      FROM requests WHERE outcome <> 'pending' GROUP BY 1, 2, 3;

CREATE TRIGGER a_request_is_summed AFTER UPDATE OF outcome ON requests
WHEN OLD.outcome = 'pending' AND NEW.outcome <> 'pending' BEGIN
    INSERT INTO usage_by_month VALUES (
        NEW.account_id, NEW.month, 1, ifnull(NEW.input_tokens, 0), ifnull(NEW.output_tokens, 0),
        ifnull(NEW.cost / 1000000000, 0), ifnull(NEW.cost % 1000000000, 0))
    ON CONFLICT DO UPDATE SET
        requests = requests + 1,
        input_tokens = input_tokens + excluded.input_tokens,
        output_tokens = output_tokens + excluded.output_tokens,
        cost_units = cost_units + excluded.cost_units,
        cost_nanos = cost_nanos + excluded.cost_nanos;
    INSERT INTO traffic_by_day VALUES (
        NEW.started_at / 86400000, NEW.upstream, NEW.outcome, 1,
        ifnull(NEW.cost / 1000000000, 0), ifnull(NEW.cost % 1000000000, 0))
    ON CONFLICT DO UPDATE SET
        requests = requests + 1,
        cost_units = cost_units + excluded.cost_units,
        cost_nanos = cost_nanos + excluded.cost_nanos;
END;

-- version 6

-- INSERT OR REPLACE would bypass the triggers above, so it is refused.
CREATE TRIGGER changes_are_new BEFORE INSERT ON changes
WHEN EXISTS (SELECT 1 FROM changes WHERE id = NEW.id)
BEGIN SELECT RAISE(ABORT, 'the log of changes is only ever added to'); END;

DROP TRIGGER a_price_is_added;
CREATE TRIGGER a_price_is_added AFTER INSERT ON prices BEGIN
    INSERT INTO changes VALUES (NULL, (SELECT at FROM acting), (SELECT name FROM acting), 'price',
        NEW.id, NULL, NULL, json_object('model', NEW.model, 'tier', NEW.tier,
            'above_input_tokens', NEW.above_input_tokens, 'effective_at', NEW.effective_at,
            'input', NEW.input, 'cached_input', NEW.cached_input, 'cache_write', NEW.cache_write,
            'output', NEW.output, 'image_input', NEW.image_input,
            'image_output', NEW.image_output, 'web_search', NEW.web_search,
            'max_output_tokens', NEW.max_output_tokens, 'source', NEW.source,
            'reason', NEW.reason));
END;

-- version 7

-- A browser is remembered for every login that was used in it.
ALTER TABLE known_browsers RENAME TO known_before;
CREATE TABLE known_browsers (
    hash                BLOB NOT NULL CHECK (length(hash) = 32),  -- SHA-256 of the cookie
    user_id             TEXT NOT NULL REFERENCES users (id) ON DELETE CASCADE,
    created_at          INTEGER NOT NULL,       -- when the login was last used in it
    PRIMARY KEY (hash, user_id)
) STRICT, WITHOUT ROWID;
INSERT INTO known_browsers SELECT * FROM known_before;
DROP TABLE known_before;
CREATE INDEX known_browsers_of_a_user ON known_browsers (user_id);

-- When a password changes, everything that it gave access to ends.
CREATE TRIGGER a_password_ends AFTER UPDATE OF password ON users BEGIN
    DELETE FROM sessions WHERE user_id = NEW.id;
    DELETE FROM known_browsers WHERE user_id = NEW.id;
END;

-- version 8

ALTER TABLE stored_objects ADD COLUMN
    minted_input        INTEGER NOT NULL DEFAULT 0 CHECK (minted_input IN (0, 1));  -- 1: a response
                                                -- whose input has only ids that the upstream chose

-- Random keys that must stay the same across restarts and never leave the gateway.
CREATE TABLE secrets (
    name                TEXT PRIMARY KEY CHECK (name = 'idempotency'),  -- the HMAC key that
                                                -- makes idempotency keys different for each account
    secret              BLOB NOT NULL CHECK (length(secret) = 32)
) STRICT;

-- version 9

ALTER TABLE prices ADD COLUMN
    cache_write_12h     INTEGER CHECK (cache_write_12h >= 0);   -- for what is kept for 12 hours; NULL: not
                                                -- known, as for the next two
ALTER TABLE prices ADD COLUMN
    file_search         INTEGER CHECK (file_search >= 0);       -- per call
ALTER TABLE prices ADD COLUMN
    container           INTEGER CHECK (container >= 0);         -- per new container in which code runs

ALTER TABLE requests ADD COLUMN
    cache_write_12h_tokens INTEGER CHECK (cache_write_12h_tokens >= 0);  -- part of cache_write_tokens
ALTER TABLE requests ADD COLUMN
    file_searches       INTEGER CHECK (file_searches >= 0);
ALTER TABLE requests ADD COLUMN
    containers          INTEGER CHECK (containers >= 0);        -- new containers
ALTER TABLE usage_by_day ADD COLUMN cache_write_12h_tokens INTEGER;
ALTER TABLE usage_by_day ADD COLUMN file_searches INTEGER;
ALTER TABLE usage_by_day ADD COLUMN containers INTEGER;

-- Containers that a request was billed for. Each is billed once.
CREATE TABLE billed_containers (
    id                  TEXT PRIMARY KEY        -- the upstream's id
) STRICT, WITHOUT ROWID;
INSERT INTO billed_containers SELECT id FROM stored_objects WHERE id GLOB 'cntr_*';  -- they were not
                                                -- billed when they were created, and are not billed later

-- A key that replaces another one shares its budget.
ALTER TABLE keys ADD COLUMN
    budget_id           TEXT;                   -- the first key of the chain; NULL: itself
CREATE INDEX keys_of_a_budget ON keys (budget_id) WHERE budget_id IS NOT NULL;

-- What a request that builds on an object reads with it, in tokens.
ALTER TABLE stored_objects ADD COLUMN
    tokens              INTEGER CHECK (tokens >= 0);  -- of a response or conversation: its input and
                                                -- output; of an item: a maximum; NULL: not known
ALTER TABLE stored_objects ADD COLUMN
    likely_tokens       INTEGER CHECK (likely_tokens >= 0);  -- an estimate, if `tokens` is the maximum
                                                -- that was held for it; NULL: the same as `tokens`
ALTER TABLE stored_objects ADD COLUMN
    extras              INTEGER NOT NULL DEFAULT 0 CHECK (extras BETWEEN 0 AND 15);  -- what a request
                                                -- that builds on it can use, as a sum of 1: web search,
                                                -- 2: file search, 4: containers, 8: long cache
UPDATE stored_objects SET tokens = reported.tokens
  FROM (SELECT response_id, max(ifnull(input_tokens, 0) + ifnull(output_tokens, 0)
                                + ifnull(image_output_tokens, 0)) AS tokens
          FROM requests WHERE response_id IS NOT NULL AND usage_source <> 'none'
         GROUP BY response_id) AS reported
 WHERE reported.response_id = stored_objects.id;

-- For the estimate of a background response: what was seen of it besides its text, and its limits.
ALTER TABLE background ADD COLUMN
    seen                TEXT;                   -- JSON, including the output; NULL: only text_bytes is known,
                                                -- which only earlier versions write
ALTER TABLE background ADD COLUMN
    most                TEXT;                   -- the maximum usage that was held, as JSON; NULL: not known

-- Estimated requests whose response may still show its usage later. The correction of a request
-- removes its row.
CREATE TABLE estimates (
    response_id         TEXT PRIMARY KEY,
    request_id          TEXT NOT NULL REFERENCES requests (request_id),
    admitted_at         INTEGER NOT NULL,       -- ledger time; the prices of that time apply
    image_model         TEXT NOT NULL           -- the model of the request's image tool
) STRICT, WITHOUT ROWID;

CREATE INDEX estimates_of_a_request ON estimates (request_id);

-- The true usage of estimated requests, as their responses showed it later. Rows are only ever added.
-- A correction takes the place of the numbers in its request's row.
CREATE TABLE corrections (
    request_id          TEXT PRIMARY KEY REFERENCES requests (request_id),
    account_id          TEXT NOT NULL REFERENCES accounts (id),
    month               TEXT NOT NULL,          -- the statement that the difference is on
    created_at          INTEGER NOT NULL,
    service_tier        TEXT,
    price_id            INTEGER REFERENCES prices (id),
    cost                INTEGER CHECK (cost >= 0),  -- nanos; NULL: the model has no price
    input_tokens        INTEGER CHECK (input_tokens >= 0),
    cached_input_tokens INTEGER CHECK (cached_input_tokens >= 0),
    cache_write_tokens  INTEGER CHECK (cache_write_tokens >= 0),
    output_tokens       INTEGER CHECK (output_tokens >= 0),
    reasoning_tokens    INTEGER CHECK (reasoning_tokens >= 0),
    image_input_tokens  INTEGER CHECK (image_input_tokens >= 0),
    image_output_tokens INTEGER CHECK (image_output_tokens >= 0),
    web_searches        INTEGER CHECK (web_searches >= 0),
    tool_input_tokens   INTEGER CHECK (tool_input_tokens >= 0),
    cache_write_12h_tokens INTEGER CHECK (cache_write_12h_tokens >= 0),
    file_searches       INTEGER CHECK (file_searches >= 0),
    containers          INTEGER CHECK (containers >= 0)
) STRICT, WITHOUT ROWID;

CREATE INDEX corrections_of_an_account ON corrections (account_id, month);

CREATE TRIGGER corrections_stay BEFORE UPDATE ON corrections
BEGIN SELECT RAISE(ABORT, 'a correction can''t be changed'); END;
CREATE TRIGGER corrections_are_kept BEFORE DELETE ON corrections
BEGIN SELECT RAISE(ABORT, 'a correction can''t be deleted'); END;
CREATE TRIGGER corrections_are_new BEFORE INSERT ON corrections
WHEN EXISTS (SELECT 1 FROM corrections WHERE request_id = NEW.request_id)
BEGIN SELECT RAISE(ABORT, 'a request is corrected once'); END;

DROP TRIGGER a_request_is_settled;
CREATE TRIGGER a_request_is_settled AFTER UPDATE OF outcome ON requests
WHEN OLD.outcome = 'pending' AND NEW.outcome <> 'pending' BEGIN
    INSERT INTO usage_by_day VALUES (
        NEW.account_id, NEW.month, NEW.started_at / 86400000,
        ifnull(NEW.model, NEW.requested_model), NEW.requested_model, NEW.key_id, 1,
        NEW.usage_source = 'estimated', NEW.usage_source = 'none', NEW.input_tokens,
        NEW.cached_input_tokens, NEW.cache_write_tokens, NEW.output_tokens, NEW.reasoning_tokens,
        NEW.image_input_tokens, NEW.image_output_tokens, NEW.web_searches,
        ifnull(NEW.cost / 1000000000, 0), ifnull(NEW.cost % 1000000000, 0),
        NEW.tool_input_tokens, NEW.cache_write_12h_tokens, NEW.file_searches, NEW.containers)
    ON CONFLICT DO UPDATE SET
        requests = requests + 1,
        estimated = estimated + excluded.estimated,
        unreported = unreported + excluded.unreported,
        input_tokens = coalesce(
            input_tokens + excluded.input_tokens, input_tokens, excluded.input_tokens),
        cached_input_tokens = coalesce(
            cached_input_tokens + excluded.cached_input_tokens, cached_input_tokens, excluded.cached_input_tokens),
        cache_write_tokens = coalesce(
            cache_write_tokens + excluded.cache_write_tokens, cache_write_tokens, excluded.cache_write_tokens),
        output_tokens = coalesce(
            output_tokens + excluded.output_tokens, output_tokens, excluded.output_tokens),
        reasoning_tokens = coalesce(
            reasoning_tokens + excluded.reasoning_tokens, reasoning_tokens, excluded.reasoning_tokens),
        image_input_tokens = coalesce(
            image_input_tokens + excluded.image_input_tokens, image_input_tokens, excluded.image_input_tokens),
        image_output_tokens = coalesce(
            image_output_tokens + excluded.image_output_tokens, image_output_tokens, excluded.image_output_tokens),
        web_searches = coalesce(
            web_searches + excluded.web_searches, web_searches, excluded.web_searches),
        tool_input_tokens = coalesce(
            tool_input_tokens + excluded.tool_input_tokens, tool_input_tokens, excluded.tool_input_tokens),
        cache_write_12h_tokens = coalesce(
            cache_write_12h_tokens + excluded.cache_write_12h_tokens, cache_write_12h_tokens, excluded.cache_write_12h_tokens),
        file_searches = coalesce(
            file_searches + excluded.file_searches, file_searches, excluded.file_searches),
        containers = coalesce(
            containers + excluded.containers, containers, excluded.containers),
        cost_units = cost_units + excluded.cost_units,
        cost_nanos = cost_nanos + excluded.cost_nanos;
END;

-- The difference is added to the sums of the day on which the request started.
CREATE TRIGGER a_request_is_corrected AFTER INSERT ON corrections BEGIN
    DELETE FROM estimates WHERE request_id = NEW.request_id;
    INSERT INTO usage_by_day
        SELECT r.account_id, NEW.month, r.started_at / 86400000, ifnull(r.model, r.requested_model),
               r.requested_model, r.key_id, 0, -(r.month = NEW.month), 0,
               nullif(ifnull(NEW.input_tokens, 0) - ifnull(r.input_tokens, 0), 0),
               nullif(ifnull(NEW.cached_input_tokens, 0) - ifnull(r.cached_input_tokens, 0), 0),
               nullif(ifnull(NEW.cache_write_tokens, 0) - ifnull(r.cache_write_tokens, 0), 0),
               nullif(ifnull(NEW.output_tokens, 0) - ifnull(r.output_tokens, 0), 0),
               nullif(ifnull(NEW.reasoning_tokens, 0) - ifnull(r.reasoning_tokens, 0), 0),
               nullif(ifnull(NEW.image_input_tokens, 0) - ifnull(r.image_input_tokens, 0), 0),
               nullif(ifnull(NEW.image_output_tokens, 0) - ifnull(r.image_output_tokens, 0), 0),
               nullif(ifnull(NEW.web_searches, 0) - ifnull(r.web_searches, 0), 0),
               (ifnull(NEW.cost, 0) - ifnull(r.cost, 0)) / 1000000000, (ifnull(NEW.cost, 0) - ifnull(r.cost, 0)) % 1000000000,
               nullif(ifnull(NEW.tool_input_tokens, 0) - ifnull(r.tool_input_tokens, 0), 0),
               nullif(ifnull(NEW.cache_write_12h_tokens, 0) - ifnull(r.cache_write_12h_tokens, 0), 0),
               nullif(ifnull(NEW.file_searches, 0) - ifnull(r.file_searches, 0), 0),
               nullif(ifnull(NEW.containers, 0) - ifnull(r.containers, 0), 0)
          FROM requests AS r WHERE r.request_id = NEW.request_id
    ON CONFLICT DO UPDATE SET
        estimated = estimated + excluded.estimated,
        input_tokens = coalesce(
            input_tokens + excluded.input_tokens, input_tokens, excluded.input_tokens),
        cached_input_tokens = coalesce(
            cached_input_tokens + excluded.cached_input_tokens, cached_input_tokens, excluded.cached_input_tokens),
        cache_write_tokens = coalesce(
            cache_write_tokens + excluded.cache_write_tokens, cache_write_tokens, excluded.cache_write_tokens),
        output_tokens = coalesce(
            output_tokens + excluded.output_tokens, output_tokens, excluded.output_tokens),
        reasoning_tokens = coalesce(
            reasoning_tokens + excluded.reasoning_tokens, reasoning_tokens, excluded.reasoning_tokens),
        image_input_tokens = coalesce(
            image_input_tokens + excluded.image_input_tokens, image_input_tokens, excluded.image_input_tokens),
        image_output_tokens = coalesce(
            image_output_tokens + excluded.image_output_tokens, image_output_tokens, excluded.image_output_tokens),
        web_searches = coalesce(
            web_searches + excluded.web_searches, web_searches, excluded.web_searches),
        tool_input_tokens = coalesce(
            tool_input_tokens + excluded.tool_input_tokens, tool_input_tokens, excluded.tool_input_tokens),
        cache_write_12h_tokens = coalesce(
            cache_write_12h_tokens + excluded.cache_write_12h_tokens, cache_write_12h_tokens, excluded.cache_write_12h_tokens),
        file_searches = coalesce(
            file_searches + excluded.file_searches, file_searches, excluded.file_searches),
        containers = coalesce(
            containers + excluded.containers, containers, excluded.containers),
        cost_units = cost_units + excluded.cost_units,
        cost_nanos = cost_nanos + excluded.cost_nanos;
    INSERT INTO usage_by_month
        SELECT r.account_id, NEW.month, 0, ifnull(NEW.input_tokens, 0) - ifnull(r.input_tokens, 0),
               ifnull(NEW.output_tokens, 0) - ifnull(r.output_tokens, 0),
               (ifnull(NEW.cost, 0) - ifnull(r.cost, 0)) / 1000000000, (ifnull(NEW.cost, 0) - ifnull(r.cost, 0)) % 1000000000
          FROM requests AS r WHERE r.request_id = NEW.request_id
    ON CONFLICT DO UPDATE SET
        input_tokens = input_tokens + excluded.input_tokens,
        output_tokens = output_tokens + excluded.output_tokens,
        cost_units = cost_units + excluded.cost_units,
        cost_nanos = cost_nanos + excluded.cost_nanos;
    UPDATE traffic_by_day SET
        cost_units = cost_units + (SELECT (ifnull(NEW.cost, 0) - ifnull(r.cost, 0)) / 1000000000
            FROM requests AS r WHERE r.request_id = NEW.request_id),
        cost_nanos = cost_nanos + (SELECT (ifnull(NEW.cost, 0) - ifnull(r.cost, 0)) % 1000000000
            FROM requests AS r WHERE r.request_id = NEW.request_id)
     WHERE (day, upstream, outcome) = (SELECT r.started_at / 86400000, r.upstream, r.outcome
            FROM requests AS r WHERE r.request_id = NEW.request_id);
END;

DROP TRIGGER a_price_is_added;
CREATE TRIGGER a_price_is_added AFTER INSERT ON prices BEGIN
    INSERT INTO changes VALUES (NULL, (SELECT at FROM acting), (SELECT name FROM acting), 'price',
        NEW.id, NULL, NULL, json_object('model', NEW.model, 'tier', NEW.tier,
            'above_input_tokens', NEW.above_input_tokens, 'effective_at', NEW.effective_at,
            'input', NEW.input, 'cached_input', NEW.cached_input, 'cache_write', NEW.cache_write,
            'cache_write_12h', NEW.cache_write_12h, 'output', NEW.output,
            'image_input', NEW.image_input, 'image_output', NEW.image_output,
            'web_search', NEW.web_search, 'file_search', NEW.file_search,
            'container', NEW.container, 'max_output_tokens', NEW.max_output_tokens,
            'source', NEW.source, 'reason', NEW.reason));
END;

-- version 10

-- What each request in flight has used so far, in case the process is killed. The next process
-- copies this into the request's row. Requests that take less than a second, or whose answer has not
-- begun, have no row here. admitted_at, image_model and held are as in estimates, or NULL if the
-- response can't be fetched later.
CREATE TABLE unsettled (
    request_id          TEXT PRIMARY KEY REFERENCES requests (request_id),
    settled             TEXT NOT NULL,          -- JSON: the request's row as if it had just ended
    admitted_at         INTEGER,
    image_model         TEXT,
    held                INTEGER
) STRICT, WITHOUT ROWID;

ALTER TABLE estimates ADD COLUMN
    held                INTEGER CHECK (held >= 0);  -- nanos that were held for the request; NULL: not
                                                    -- known, written by an earlier version

-- version 11

-- Each start of a gateway. The rows of its requests have its number.
CREATE TABLE runs (
    id                  INTEGER PRIMARY KEY,
    started_at          INTEGER NOT NULL
) STRICT;

ALTER TABLE requests ADD COLUMN
    run                 INTEGER;                -- the start that began it; NULL: written by an earlier version

-- Requests that another process marked as interrupted while they were in flight. Their own process
-- adds a row here, which opens them again, and settles them in the same transaction.
CREATE TABLE reopened (
    id                  INTEGER PRIMARY KEY,
    request_id          TEXT NOT NULL REFERENCES requests (request_id),
    reopened_at         INTEGER NOT NULL
) STRICT;

CREATE TRIGGER a_request_is_reopened AFTER INSERT ON reopened BEGIN
    UPDATE usage_by_day SET
        requests = requests - 1,
        estimated = estimated - (r.usage_source = 'estimated'),
        unreported = unreported - (r.usage_source = 'none'),
        input_tokens = usage_by_day.input_tokens - ifnull(r.input_tokens, 0),
        cached_input_tokens = usage_by_day.cached_input_tokens - ifnull(r.cached_input_tokens, 0),
        cache_write_tokens = usage_by_day.cache_write_tokens - ifnull(r.cache_write_tokens, 0),
        output_tokens = usage_by_day.output_tokens - ifnull(r.output_tokens, 0),
        reasoning_tokens = usage_by_day.reasoning_tokens - ifnull(r.reasoning_tokens, 0),
        image_input_tokens = usage_by_day.image_input_tokens - ifnull(r.image_input_tokens, 0),
        image_output_tokens = usage_by_day.image_output_tokens - ifnull(r.image_output_tokens, 0),
        web_searches = usage_by_day.web_searches - ifnull(r.web_searches, 0),
        tool_input_tokens = usage_by_day.tool_input_tokens - ifnull(r.tool_input_tokens, 0),
        cache_write_12h_tokens = usage_by_day.cache_write_12h_tokens - ifnull(r.cache_write_12h_tokens, 0),
        file_searches = usage_by_day.file_searches - ifnull(r.file_searches, 0),
        containers = usage_by_day.containers - ifnull(r.containers, 0),
        cost_units = cost_units - ifnull(r.cost / 1000000000, 0),
        cost_nanos = cost_nanos - ifnull(r.cost % 1000000000, 0)
      FROM requests AS r
     WHERE r.request_id = NEW.request_id
       AND day = r.started_at / 86400000 AND usage_by_day.account_id = r.account_id
       AND usage_by_day.month = r.month
       AND usage_by_day.model = ifnull(r.model, r.requested_model)
       AND usage_by_day.requested_model = r.requested_model AND usage_by_day.key_id = r.key_id;
    UPDATE usage_by_month SET
        requests = requests - 1,
        input_tokens = usage_by_month.input_tokens - ifnull(r.input_tokens, 0),
        output_tokens = usage_by_month.output_tokens - ifnull(r.output_tokens, 0),
        cost_units = cost_units - ifnull(r.cost / 1000000000, 0),
        cost_nanos = cost_nanos - ifnull(r.cost % 1000000000, 0)
      FROM requests AS r
     WHERE r.request_id = NEW.request_id
       AND usage_by_month.account_id = r.account_id AND usage_by_month.month = r.month;
    UPDATE traffic_by_day SET
        requests = requests - 1,
        cost_units = cost_units - ifnull(r.cost / 1000000000, 0),
        cost_nanos = cost_nanos - ifnull(r.cost % 1000000000, 0)
      FROM requests AS r
     WHERE r.request_id = NEW.request_id AND day = r.started_at / 86400000
       AND traffic_by_day.upstream = r.upstream AND traffic_by_day.outcome = r.outcome;
    DELETE FROM estimates WHERE request_id = NEW.request_id;
    UPDATE requests SET outcome = 'pending' WHERE request_id = NEW.request_id;
END;

-- `db set-time` moves what is dated in the future. The log records that as a kind of change, too.
CREATE TABLE changes_with_time (
    id                  INTEGER PRIMARY KEY,
    changed_at          INTEGER NOT NULL,
    changed_by          TEXT NOT NULL,
    kind                TEXT NOT NULL CHECK (kind IN
                            ('account', 'key', 'price', 'payment', 'notice', 'user', 'time')),
    object_id           TEXT NOT NULL,
    account_id          TEXT,                   -- the account it belongs to
    before              TEXT,                   -- the columns as JSON; NULL: it was added
    after               TEXT                    -- NULL: it was removed
) STRICT;
INSERT INTO changes_with_time SELECT * FROM changes;
DROP TABLE changes;                             -- with its index and triggers
PRAGMA legacy_alter_table = ON;                 -- otherwise triggers that name the table are an error
ALTER TABLE changes_with_time RENAME TO changes;
PRAGMA legacy_alter_table = OFF;
CREATE INDEX changes_of_an_account ON changes (account_id, id);

-- The time that the ledger is set back to. Empty outside the transaction that does so. Dates that
-- money depends on may be changed only while this table has its row, and only from a later time to
-- exactly this time.
CREATE TABLE setting_time (
    id                  INTEGER PRIMARY KEY CHECK (id = 1),
    at                  INTEGER NOT NULL CHECK (at >= 0),
    month               TEXT NOT NULL,          -- the month of that time
    now_at              INTEGER NOT NULL,       -- the new date of logins that are dated later
    before_at           INTEGER NOT NULL,       -- the ledger's time until now
    moved               TEXT NOT NULL           -- JSON: how many rows are dated later, by table;
                                                -- null: no rows
) STRICT;

CREATE TRIGGER the_time_is_set AFTER INSERT ON setting_time BEGIN
    INSERT INTO changes VALUES (NULL, (SELECT at FROM acting), (SELECT name FROM acting), 'time',
        'ledger', NULL, json_object('ledger_at', NEW.before_at),
        json_patch(json_object('ledger_at', NEW.at), NEW.moved));
END;

CREATE TRIGGER changes_stay BEFORE UPDATE ON changes
WHEN NOT ((NEW.id, NEW.changed_by, NEW.kind, NEW.object_id, NEW.account_id, NEW.before, NEW.after)
          IS (OLD.id, OLD.changed_by, OLD.kind, OLD.object_id, OLD.account_id, OLD.before, OLD.after)
      AND NEW.changed_at IS min(OLD.changed_at, (SELECT at FROM setting_time)))
BEGIN SELECT RAISE(ABORT, 'the log of changes is only ever added to'); END;
CREATE TRIGGER changes_are_kept BEFORE DELETE ON changes
BEGIN SELECT RAISE(ABORT, 'the log of changes is only ever added to'); END;
CREATE TRIGGER changes_are_new BEFORE INSERT ON changes
WHEN EXISTS (SELECT 1 FROM changes WHERE id = NEW.id)
BEGIN SELECT RAISE(ABORT, 'the log of changes is only ever added to'); END;

DROP TRIGGER settled_is_settled;
CREATE TRIGGER settled_is_settled
BEFORE UPDATE OF account_id, cost, month, price_id, started_at ON requests
WHEN OLD.outcome <> 'pending'
 AND NOT ((NEW.account_id, NEW.cost, NEW.price_id) IS (OLD.account_id, OLD.cost, OLD.price_id)
      AND NEW.started_at IS min(OLD.started_at, (SELECT at FROM setting_time))
      AND NEW.month IS min(OLD.month, (SELECT month FROM setting_time)))
BEGIN SELECT RAISE(ABORT, 'a settled request can''t be changed'); END;

-- A price that took effect after this time, but not after it was added, took effect at once.
DROP TRIGGER prices_stay;
CREATE TRIGGER prices_stay BEFORE UPDATE ON prices
WHEN NOT ((NEW.id, NEW.model, NEW.tier, NEW.above_input_tokens, NEW.input, NEW.cached_input,
           NEW.cache_write, NEW.cache_write_12h, NEW.output, NEW.image_input, NEW.image_output,
           NEW.web_search, NEW.file_search, NEW.container, NEW.max_output_tokens, NEW.currency,
           NEW.source, NEW.added_by, NEW.reason)
          IS (OLD.id, OLD.model, OLD.tier, OLD.above_input_tokens, OLD.input, OLD.cached_input,
           OLD.cache_write, OLD.cache_write_12h, OLD.output, OLD.image_input, OLD.image_output,
           OLD.web_search, OLD.file_search, OLD.container, OLD.max_output_tokens, OLD.currency,
           OLD.source, OLD.added_by, OLD.reason)
      AND NEW.created_at IS min(OLD.created_at, (SELECT at FROM setting_time))
      AND NEW.effective_at IS iif(OLD.effective_at <= OLD.created_at,
           min(OLD.effective_at, (SELECT at FROM setting_time)), OLD.effective_at))
BEGIN SELECT RAISE(ABORT, 'a price can''t be changed, only superseded'); END;

DROP TRIGGER payments_stay;
CREATE TRIGGER payments_stay BEFORE UPDATE ON payments
WHEN NOT ((NEW.id, NEW.account_id, NEW.units, NEW.nanos, NEW.currency, NEW.reference, NEW.reason,
           NEW.added_by)
          IS (OLD.id, OLD.account_id, OLD.units, OLD.nanos, OLD.currency, OLD.reference, OLD.reason,
           OLD.added_by)
      AND NEW.created_at IS min(OLD.created_at, (SELECT at FROM setting_time))
      AND NEW.month IS min(OLD.month, (SELECT month FROM setting_time)))
BEGIN SELECT RAISE(ABORT, 'a payment can''t be changed, only corrected by another'); END;

DROP TRIGGER corrections_stay;
CREATE TRIGGER corrections_stay BEFORE UPDATE ON corrections
WHEN NOT ((NEW.request_id, NEW.account_id, NEW.service_tier, NEW.price_id, NEW.cost,
           NEW.input_tokens, NEW.cached_input_tokens, NEW.cache_write_tokens, NEW.output_tokens,
           NEW.reasoning_tokens, NEW.image_input_tokens, NEW.image_output_tokens, NEW.web_searches,
           NEW.tool_input_tokens, NEW.cache_write_12h_tokens, NEW.file_searches, NEW.containers)
          IS (OLD.request_id, OLD.account_id, OLD.service_tier, OLD.price_id, OLD.cost,
           OLD.input_tokens, OLD.cached_input_tokens, OLD.cache_write_tokens, OLD.output_tokens,
           OLD.reasoning_tokens, OLD.image_input_tokens, OLD.image_output_tokens, OLD.web_searches,
           OLD.tool_input_tokens, OLD.cache_write_12h_tokens, OLD.file_searches, OLD.containers)
      AND NEW.created_at IS min(OLD.created_at, (SELECT at FROM setting_time))
      AND NEW.month IS min(OLD.month, (SELECT month FROM setting_time)))
BEGIN SELECT RAISE(ABORT, 'a correction can''t be changed'); END;

-- version 12

-- Logins are limited by network and address alone; a browser in which a login was used before is
-- like any other.
DROP TRIGGER IF EXISTS a_password_ends;
CREATE TRIGGER a_password_ends AFTER UPDATE OF password ON users BEGIN
    DELETE FROM sessions WHERE user_id = NEW.id;
END;
DROP TABLE IF EXISTS known_browsers;

-- version 13

-- What a request met at its upstream. NULL in the rows of earlier versions.
ALTER TABLE requests ADD COLUMN
    attempts            INTEGER CHECK (attempts >= 0);  -- how many times it was sent, or tried to be sent,
                                                -- to an upstream; NULL: not known, or it was not sent
ALTER TABLE requests ADD COLUMN
    upstream_status     INTEGER CHECK (upstream_status BETWEEN 100 AND 999);  -- the HTTP status of the
                                                -- upstream's last answer; NULL: none came
ALTER TABLE requests ADD COLUMN
    upstream_error_code TEXT CHECK (length(upstream_error_code) BETWEEN 1 AND 100);  -- the code in that
                                                -- answer's error, or why none came; NULL: no failure
ALTER TABLE requests ADD COLUMN
    upstream_request_id TEXT CHECK (length(upstream_request_id) BETWEEN 1 AND 128);  -- its x-request-id

CREATE INDEX failed_requests ON requests (started_at)
    WHERE outcome IN ('upstream_error', 'upstream_failed');
CREATE INDEX failed_requests_of_an_account ON requests (account_id, started_at)
    WHERE outcome IN ('upstream_error', 'upstream_failed');
-- What happened to the upstreams. A member is one upstream with one of its keys.

-- The newest changes of the members' states.
CREATE TABLE upstream_changes (
    number              INTEGER PRIMARY KEY,    -- in the order in which they happened
    id                  TEXT NOT NULL UNIQUE,   -- upc_ and 16 hexadecimal digits
    changed_at          INTEGER NOT NULL,
    upstream            TEXT NOT NULL,          -- the member's name
    was                 TEXT NOT NULL CHECK (was IN ('up', 'resting', 'out', 'unusable')),
    state               TEXT NOT NULL CHECK (state IN ('up', 'resting', 'out', 'unusable')),
    reason              TEXT NOT NULL CHECK (length(reason) <= 100),    -- a code; no upstream's text
    model               TEXT CHECK (length(model) BETWEEN 1 AND 256),   -- NULL: all models
    until               INTEGER,                -- for how long at most; NULL: not known
    changed_by          TEXT                    -- the operator who did it; NULL: the gateway
) STRICT;

CREATE TRIGGER upstream_changes_are_bounded AFTER INSERT ON upstream_changes BEGIN
    DELETE FROM upstream_changes WHERE number <= NEW.number - 1000;
END;

-- Until when members rest, so that a restart does not send requests to a limited upstream.
CREATE TABLE upstream_rests (
    upstream            TEXT NOT NULL,          -- the member's name
    model               TEXT NOT NULL CHECK (length(model) <= 256),     -- '': all models
    began_at            INTEGER NOT NULL,
    until               INTEGER NOT NULL CHECK (until > began_at),
    reason              TEXT NOT NULL CHECK (length(reason) <= 100),    -- a code
    PRIMARY KEY (upstream, model)
) STRICT, WITHOUT ROWID;

-- Clients name the models: of too many rests, those of single models that end first are dropped.
CREATE TRIGGER upstream_rests_are_bounded AFTER INSERT ON upstream_rests
WHEN (SELECT count(*) FROM upstream_rests) > 1000 BEGIN
    DELETE FROM upstream_rests WHERE (upstream, model) IN (
        SELECT upstream, model FROM upstream_rests ORDER BY model = '', until LIMIT 1);
END;

-- What the webhook is told, whether it arrived, and how often that was tried.
CREATE TABLE webhook_messages (
    number              INTEGER PRIMARY KEY,    -- in the order in which they are sent
    id                  TEXT NOT NULL UNIQUE,   -- the webhook-id: of a budget the notice's id, else
                                                -- msg_ and 16 hexadecimal digits
    type                TEXT NOT NULL CHECK (type IN ('budget.reached', 'upstream.out',
                            'upstream.back', 'upstream.credentials')),
    data                TEXT NOT NULL CHECK (json_valid(data)),     -- what is sent: an object
    created_at          INTEGER NOT NULL,
    tries               INTEGER NOT NULL DEFAULT 0 CHECK (tries >= 0),
    tried_at            INTEGER,                -- the last time
    status              INTEGER,                -- of the last answer; NULL: none came
    error               TEXT,                   -- the type of the error, if none came
    delivered_at        INTEGER                 -- when the webhook accepted it
) STRICT;

-- The newest are kept, and those that are still to be sent: for 3 days (redbtc/billing/webhook.py).
CREATE TRIGGER webhook_messages_are_bounded AFTER INSERT ON webhook_messages BEGIN
    DELETE FROM webhook_messages
     WHERE number <= NEW.number - 1000
       AND (delivered_at IS NOT NULL OR created_at <= NEW.created_at - 259200000);
END;

INSERT INTO webhook_messages (id, type, data, created_at, tries, delivered_at)
    SELECT notices.id, 'budget.reached',
           json_object('account', accounts.name, 'key_id', key_id, 'month', month,
                       'percent', percent, 'text', text),
           notices.created_at, delivered_at IS NOT NULL, delivered_at
      FROM notices LEFT JOIN accounts ON accounts.id = account_id
     WHERE kind = 'budget' ORDER BY notices.created_at, notices.rowid;

CREATE TRIGGER a_budget_is_reached AFTER INSERT ON notices WHEN NEW.kind = 'budget' BEGIN
    INSERT INTO webhook_messages (id, type, data, created_at)
        SELECT NEW.id, 'budget.reached',
               json_object('account', (SELECT name FROM accounts WHERE id = NEW.account_id),
                           'key_id', NEW.key_id, 'month', NEW.month, 'percent', NEW.percent,
                           'text', NEW.text),
               NEW.created_at;
END;

-- version 14

-- Kinds of usage of audio, and of text that is spoken.
ALTER TABLE requests ADD COLUMN
    audio_input_tokens  INTEGER CHECK (audio_input_tokens >= 0);  -- part of input_tokens
ALTER TABLE requests ADD COLUMN
    audio_output_tokens INTEGER CHECK (audio_output_tokens >= 0);  -- part of output_tokens
ALTER TABLE requests ADD COLUMN
    audio_ms            INTEGER CHECK (audio_ms >= 0);  -- length of audio that was read, in milliseconds
ALTER TABLE requests ADD COLUMN
    characters          INTEGER CHECK (characters >= 0);  -- of text that was spoken, counted by the gateway
ALTER TABLE corrections ADD COLUMN
    audio_input_tokens  INTEGER;
ALTER TABLE corrections ADD COLUMN
    audio_output_tokens INTEGER;
ALTER TABLE corrections ADD COLUMN
    audio_ms            INTEGER;
ALTER TABLE corrections ADD COLUMN
    characters          INTEGER;
ALTER TABLE usage_by_day ADD COLUMN
    audio_input_tokens  INTEGER;
ALTER TABLE usage_by_day ADD COLUMN
    audio_output_tokens INTEGER;
ALTER TABLE usage_by_day ADD COLUMN
    audio_ms            INTEGER;
ALTER TABLE usage_by_day ADD COLUMN
    characters          INTEGER;
ALTER TABLE prices ADD COLUMN
    audio_input         INTEGER CHECK (audio_input >= 0);  -- NULL: as other input
ALTER TABLE prices ADD COLUMN
    audio_output        INTEGER CHECK (audio_output >= 0);  -- NULL: as other output
ALTER TABLE prices ADD COLUMN
    audio_minute        INTEGER CHECK (audio_minute >= 0);  -- a minute of audio; NULL: as 1,000 tokens of audio input
ALTER TABLE prices ADD COLUMN
    characters          INTEGER CHECK (characters >= 0);  -- a million characters; NULL: the higher of input and audio output

-- The gateway itself counts what is billed by the call or the character. A CHECK can't be altered by
-- ALTER TABLE; this is the way that SQLite documents for it (lang_altertable.html, section 7). The last
-- line ends the permission and reads the schema again.
PRAGMA writable_schema = ON;
UPDATE sqlite_schema
   SET sql = replace(sql, '(''upstream'', ''estimated'', ''none'')',
                     '(''upstream'', ''estimated'', ''none'', ''counted'')')
 WHERE type = 'table' AND name = 'requests';
PRAGMA writable_schema = RESET;

-- version 15

-- Clients with credentials of their own ([[upstreams]] credentials = "client").
ALTER TABLE requests ADD COLUMN
    credentials         TEXT CHECK (credentials IN ('operator', 'client'));  -- whose credential the
                                                -- upstream got; NULL: a row of an earlier version
ALTER TABLE stored_objects ADD COLUMN
    credential          TEXT CHECK (length(credential) = 32);  -- a keyed hash of the client's own
                                                -- credential that it was stored with; NULL: the operator's

-- version 16

-- Content of requests is kept only where an owner has asked for it, in a database of its own
-- (redbtc/store/request_log/).
ALTER TABLE accounts ADD COLUMN
    log_days            INTEGER CHECK (log_days > 0);   -- days for which bodies are kept; NULL: they are not
ALTER TABLE keys ADD COLUMN
    log_days            INTEGER CHECK (log_days > 0);   -- the same for this key; NULL: as its account's

-- Accounts that are closed. The row stays, with its id as its name, since statements need it.
ALTER TABLE accounts ADD COLUMN
    closing_asked_at    INTEGER;                -- when its owner asked to close it; NULL: not asked
ALTER TABLE accounts ADD COLUMN
    terminated_at       INTEGER;                -- when it was terminated: its keys were revoked then
ALTER TABLE accounts ADD COLUMN
    erase_at            INTEGER;                -- when all that identifies it is erased, if terminated
ALTER TABLE accounts ADD COLUMN
    erased_at           INTEGER;                -- when nothing of that was left in any file

-- What the transaction may erase. Empty outside a transaction, so that nothing else can be.
CREATE TABLE erasing (
    id                  INTEGER PRIMARY KEY CHECK (id = 1),
    what                TEXT NOT NULL CHECK (what IN ('account', 'usage', 'changes')),
    account_id          TEXT                    -- the account, if `what` is account
                        CHECK ((account_id IS NOT NULL) = (what = 'account'))
) STRICT;

-- Sums of the settled requests whose rows were erased since they were old (retention.usage_days).
-- usage_by_day still has them. The trigger a_request_is_rolled_up keeps them.
CREATE TABLE rolled_up (
    account_id          TEXT NOT NULL,
    month               TEXT NOT NULL,          -- the month of the statement
    requests            INTEGER NOT NULL,
    cost_units          INTEGER NOT NULL,       -- before corrections
    cost_nanos          INTEGER NOT NULL,
    PRIMARY KEY (account_id, month)
) STRICT, WITHOUT ROWID;

-- What a statement shows of the corrected request, once the request's row was erased. A correction
-- outlives its request.
ALTER TABLE corrections ADD COLUMN
    request_started_at  INTEGER;                -- NULL: the request's row has it, as for the next
ALTER TABLE corrections ADD COLUMN
    request_cost        INTEGER CHECK (request_cost >= 0);  -- nanos; its estimate

-- Found by each erased request (a foreign key).
CREATE INDEX reopened_of_a_request ON reopened (request_id);

-- The state of what is erased because it is old (redbtc/store/retention.py).
CREATE TABLE retention (
    id                  INTEGER PRIMARY KEY CHECK (id = 1),
    usage_before        INTEGER NOT NULL DEFAULT 0,     -- requests that started before it were erased,
                                                -- or are being erased; the start of a day (UTC)
    unscrubbed          INTEGER NOT NULL DEFAULT 0,     -- erasures whose content may still be in a file
    clock_seen_at       INTEGER NOT NULL DEFAULT 0,     -- the ledger's time when the gateway last looked
    leapt_at            INTEGER NOT NULL DEFAULT 0      -- the ledger's time after it last went ahead by
                                                -- more than a day between two looks
) STRICT;
INSERT INTO retention (id, clock_seen_at)
    SELECT 1, max(ifnull((SELECT max(started_at) FROM requests), 0),
                  ifnull((SELECT beat_at FROM heartbeat), 0));

CREATE TRIGGER settled_is_kept BEFORE DELETE ON requests
WHEN OLD.outcome <> 'pending' AND NOT EXISTS (SELECT 1 FROM erasing WHERE what = 'usage')
BEGIN SELECT RAISE(ABORT, 'a settled request can''t be deleted'); END;
CREATE TRIGGER a_request_is_rolled_up AFTER DELETE ON requests WHEN OLD.outcome <> 'pending' BEGIN
    INSERT INTO rolled_up VALUES (
        OLD.account_id, ifnull(OLD.month, strftime('%Y-%m', OLD.started_at / 1000, 'unixepoch')), 1,
        ifnull(OLD.cost / 1000000000, 0), ifnull(OLD.cost % 1000000000, 0))
    ON CONFLICT DO UPDATE SET
        requests = requests + 1,
        cost_units = cost_units + excluded.cost_units,
        cost_nanos = cost_nanos + excluded.cost_nanos;
END;

-- The texts of the operator that are shown at /terms and /privacy ([site]).
CREATE TABLE documents (
    name                TEXT NOT NULL CHECK (name IN ('terms', 'privacy')),
    version             TEXT NOT NULL CHECK (length(version) BETWEEN 1 AND 50),
    effective_at        INTEGER NOT NULL,
    text                TEXT NOT NULL,          -- Markdown, without the head of the file
    published_at        INTEGER NOT NULL,
    notice_id           TEXT REFERENCES notices (id),   -- that announced it; NULL: the first version
    PRIMARY KEY (name, version)
) STRICT, WITHOUT ROWID;

CREATE TRIGGER documents_stay BEFORE UPDATE ON documents
WHEN NOT ((NEW.name, NEW.version, NEW.effective_at, NEW.text, NEW.notice_id)
          IS (OLD.name, OLD.version, OLD.effective_at, OLD.text, OLD.notice_id)
      AND NEW.published_at IS min(OLD.published_at, (SELECT at FROM setting_time)))
BEGIN SELECT RAISE(ABORT, 'a published document can''t be changed, only superseded'); END;
CREATE TRIGGER documents_are_kept BEFORE DELETE ON documents
BEGIN SELECT RAISE(ABORT, 'a published document can''t be deleted, only superseded'); END;
CREATE TRIGGER a_document_is_published AFTER INSERT ON documents BEGIN
    INSERT INTO changes VALUES (NULL, (SELECT at FROM acting), (SELECT name FROM acting), 'terms',
        NEW.name, NULL, NULL, json_object('version', NEW.version, 'effective_at', NEW.effective_at));
END;

-- Which owner has accepted which version. A row outlives its user.
CREATE TABLE acceptances (
    document            TEXT NOT NULL,
    version             TEXT NOT NULL,
    user_id             TEXT NOT NULL,
    account_id          TEXT NOT NULL REFERENCES accounts (id),
    accepted_at         INTEGER NOT NULL,
    PRIMARY KEY (user_id, document, version),
    FOREIGN KEY (document, version) REFERENCES documents (name, version)
) STRICT, WITHOUT ROWID;

CREATE TRIGGER acceptances_stay BEFORE UPDATE ON acceptances
WHEN NOT ((NEW.document, NEW.version, NEW.user_id, NEW.account_id)
          IS (OLD.document, OLD.version, OLD.user_id, OLD.account_id)
      AND NEW.accepted_at IS min(OLD.accepted_at, (SELECT at FROM setting_time)))
BEGIN SELECT RAISE(ABORT, 'an acceptance can''t be changed'); END;
CREATE TRIGGER acceptances_are_kept BEFORE DELETE ON acceptances
BEGIN SELECT RAISE(ABORT, 'an acceptance can''t be deleted'); END;
CREATE TRIGGER a_document_is_accepted AFTER INSERT ON acceptances BEGIN
    INSERT INTO changes VALUES (NULL, (SELECT at FROM acting), (SELECT name FROM acting), 'terms',
        NEW.document, NEW.account_id, NULL,
        json_object('accepted', NEW.version, 'user', NEW.user_id));
END;

-- Statuses, kinds of changes and types of messages that are new, and a foreign key that is gone; see
-- version 14.
PRAGMA writable_schema = ON;
UPDATE sqlite_schema
   SET sql = replace(sql, '(''active'', ''suspended'')', '(''active'', ''suspended'', ''terminated'')')
 WHERE type = 'table' AND name = 'accounts';
UPDATE sqlite_schema
   SET sql = replace(sql, '''user'', ''time'')',
                     '''user'', ''time'', ''request_log'', ''retention'', ''terms'')')
 WHERE type = 'table' AND name = 'changes';
UPDATE sqlite_schema
   SET sql = replace(sql, ' REFERENCES requests (request_id)', '')
 WHERE type = 'table' AND name = 'corrections';
UPDATE sqlite_schema
   SET sql = replace(sql, '''upstream.credentials'')',
                     '''upstream.credentials'', ''account.closing'')')
 WHERE type = 'table' AND name = 'webhook_messages';
PRAGMA writable_schema = RESET;

-- The log of changes and payments may be changed only while something is erased.
DROP TRIGGER changes_stay;
CREATE TRIGGER changes_stay BEFORE UPDATE ON changes
WHEN NOT ((NEW.id, NEW.changed_by, NEW.kind, NEW.object_id, NEW.account_id, NEW.before, NEW.after)
          IS (OLD.id, OLD.changed_by, OLD.kind, OLD.object_id, OLD.account_id, OLD.before, OLD.after)
      AND NEW.changed_at IS min(OLD.changed_at, (SELECT at FROM setting_time)))
 AND NOT EXISTS (SELECT 1 FROM erasing WHERE account_id = OLD.account_id)
BEGIN SELECT RAISE(ABORT, 'the log of changes is only ever added to'); END;
DROP TRIGGER changes_are_kept;
CREATE TRIGGER changes_are_kept BEFORE DELETE ON changes
WHEN NOT EXISTS (SELECT 1 FROM erasing WHERE what = 'changes')
BEGIN SELECT RAISE(ABORT, 'the log of changes is only ever added to'); END;
DROP TRIGGER payments_stay;
CREATE TRIGGER payments_stay BEFORE UPDATE ON payments
WHEN NOT ((NEW.id, NEW.account_id, NEW.units, NEW.nanos, NEW.currency, NEW.reference, NEW.reason,
           NEW.added_by)
          IS (OLD.id, OLD.account_id, OLD.units, OLD.nanos, OLD.currency, OLD.reference, OLD.reason,
           OLD.added_by)
      AND NEW.created_at IS min(OLD.created_at, (SELECT at FROM setting_time))
      AND NEW.month IS min(OLD.month, (SELECT month FROM setting_time)))
 AND NOT ((NEW.id, NEW.account_id, NEW.units, NEW.nanos, NEW.currency, NEW.month, NEW.created_at)
          IS (OLD.id, OLD.account_id, OLD.units, OLD.nanos, OLD.currency, OLD.month, OLD.created_at)
      AND EXISTS (SELECT 1 FROM erasing WHERE account_id = OLD.account_id))
BEGIN SELECT RAISE(ABORT, 'a payment can''t be changed, only corrected by another'); END;

-- What a terminated account does not get any more, whichever way it is asked for (store/database.py
-- knows the message). A request that ends late may still claim what it has made: nobody could name
-- that, and it would come back after the account was erased.
CREATE TRIGGER a_terminated_account_stays BEFORE UPDATE OF name, email, status, status_reason,
    concurrency, requests_per_minute, tokens_per_minute, credit_limit, monthly_budget,
    throttle_factor, throttled_until, log_days ON accounts
WHEN OLD.status = 'terminated' AND NOT EXISTS (SELECT 1 FROM erasing WHERE account_id = OLD.id)
BEGIN SELECT RAISE(ABORT, 'the account is terminated'); END;
CREATE TRIGGER a_terminated_account_asks_for_nothing BEFORE UPDATE OF closing_asked_at ON accounts
WHEN OLD.status = 'terminated' AND OLD.closing_asked_at IS NULL AND NEW.closing_asked_at IS NOT NULL
BEGIN SELECT RAISE(ABORT, 'the account is terminated'); END;
CREATE TRIGGER a_terminated_account_gets_no_key BEFORE INSERT ON keys
WHEN (SELECT status FROM accounts WHERE id = NEW.account_id) = 'terminated'
BEGIN SELECT RAISE(ABORT, 'the account is terminated'); END;
CREATE TRIGGER a_terminated_account_gets_no_user BEFORE INSERT ON users
WHEN (SELECT status FROM accounts WHERE id = NEW.account_id) = 'terminated'
BEGIN SELECT RAISE(ABORT, 'the account is terminated'); END;
CREATE TRIGGER a_terminated_account_gets_no_password BEFORE UPDATE OF password, link ON users
WHEN ifnull(NEW.password, NEW.link) IS NOT NULL
 AND (SELECT status FROM accounts WHERE id = NEW.account_id) = 'terminated'
BEGIN SELECT RAISE(ABORT, 'the account is terminated'); END;
CREATE TRIGGER a_terminated_account_gets_no_object BEFORE INSERT ON stored_objects
WHEN (SELECT status FROM accounts WHERE id = NEW.account_id) = 'terminated'
BEGIN SELECT RAISE(IGNORE); END;

-- The log gets no copy of what is being erased.
DROP TRIGGER a_user_is_removed;
CREATE TRIGGER a_user_is_removed AFTER DELETE ON users
WHEN NOT EXISTS (SELECT 1 FROM erasing WHERE account_id = OLD.account_id) BEGIN
    INSERT INTO changes VALUES (NULL, (SELECT at FROM acting), (SELECT name FROM acting), 'user',
        OLD.id, OLD.account_id, json_object('email', OLD.email, 'role', OLD.role), NULL);
END;
DROP TRIGGER an_account_is_changed;
CREATE TRIGGER an_account_is_changed AFTER UPDATE ON accounts
WHEN NOT EXISTS (SELECT 1 FROM erasing WHERE account_id = OLD.id) BEGIN
    INSERT INTO changes
        SELECT NULL, (SELECT at FROM acting), (SELECT name FROM acting), 'account', NEW.id, NEW.id,
               before, after
          FROM (SELECT json_object('name', OLD.name, 'email', OLD.email, 'status', OLD.status,
            'status_reason', OLD.status_reason, 'concurrency', OLD.concurrency,
            'requests_per_minute', OLD.requests_per_minute,
            'tokens_per_minute', OLD.tokens_per_minute, 'credit_limit', OLD.credit_limit,
            'monthly_budget', OLD.monthly_budget, 'throttle_factor', OLD.throttle_factor,
            'throttled_until', OLD.throttled_until, 'log_days', OLD.log_days,
            'closing_asked_at', OLD.closing_asked_at, 'terminated_at', OLD.terminated_at,
            'erase_at', OLD.erase_at, 'erased_at', OLD.erased_at) AS before,
        json_object('name', NEW.name, 'email', NEW.email, 'status', NEW.status,
            'status_reason', NEW.status_reason, 'concurrency', NEW.concurrency,
            'requests_per_minute', NEW.requests_per_minute,
            'tokens_per_minute', NEW.tokens_per_minute, 'credit_limit', NEW.credit_limit,
            'monthly_budget', NEW.monthly_budget, 'throttle_factor', NEW.throttle_factor,
            'throttled_until', NEW.throttled_until, 'log_days', NEW.log_days,
            'closing_asked_at', NEW.closing_asked_at, 'terminated_at', NEW.terminated_at,
            'erase_at', NEW.erase_at, 'erased_at', NEW.erased_at) AS after)
         WHERE before <> after;
END;
DROP TRIGGER a_key_is_changed;
CREATE TRIGGER a_key_is_changed AFTER UPDATE ON keys
WHEN NOT EXISTS (SELECT 1 FROM erasing WHERE account_id = OLD.account_id) BEGIN
    INSERT INTO changes
        SELECT NULL, (SELECT at FROM acting), (SELECT name FROM acting), 'key', NEW.id, NEW.account_id,
               before, after
          FROM (SELECT json_object('label', OLD.label, 'expires_at', OLD.expires_at,
            'revoked_at', OLD.revoked_at, 'compromised', OLD.compromised,
            'log_days', OLD.log_days) AS before,
        json_object('label', NEW.label, 'expires_at', NEW.expires_at,
            'revoked_at', NEW.revoked_at, 'compromised', NEW.compromised,
            'log_days', NEW.log_days) AS after)
         WHERE before <> after;
END;

-- version 17

-- Whether the gateway could serve requests, as it measured it itself, in whole minutes. Minutes that no
-- row has passed while it was not running (redbtc/store/uptime.py). Of what ended more than 90 days ago,
-- only the newest row is kept.
CREATE TABLE uptime (
    began_at            INTEGER PRIMARY KEY,    -- the start of a minute
    ended_at            INTEGER NOT NULL CHECK (ended_at >= began_at),
    state               TEXT NOT NULL CHECK (state IN ('up', 'unknown', 'maintenance', 'draining',
                            'upstreams', 'ledger'))     -- the worst of each minute; unknown: the clock
                                                -- skipped it
) STRICT;

-- Models that clients asked for and that were refused since they have no price: only names that an
-- upstream offers (redbtc/billing/unpriced_models.py).
CREATE TABLE unpriced_models (
    model               TEXT PRIMARY KEY CHECK (length(model) BETWEEN 1 AND 64),
    requests            INTEGER NOT NULL CHECK (requests > 0),  -- that were refused
    first_at            INTEGER NOT NULL,
    last_at             INTEGER NOT NULL,
    told_at             INTEGER                 -- when the webhook was told; NULL: it was not
) STRICT, WITHOUT ROWID;

-- The accounts that asked for them.
CREATE TABLE unpriced_model_accounts (
    model               TEXT NOT NULL REFERENCES unpriced_models (model) ON DELETE CASCADE,
    account_id          TEXT NOT NULL REFERENCES accounts (id),
    requests            INTEGER NOT NULL CHECK (requests > 0),
    last_at             INTEGER NOT NULL,
    PRIMARY KEY (model, account_id)
) STRICT, WITHOUT ROWID;
CREATE INDEX unpriced_models_of_an_account ON unpriced_model_accounts (account_id);

PRAGMA writable_schema = ON;
UPDATE sqlite_schema
   SET sql = replace(sql, '''budget.reached''', '''budget.reached'', ''model.unpriced''')
 WHERE type = 'table' AND name = 'webhook_messages';
PRAGMA writable_schema = RESET;

-- What the webhook was told last of the ledger, the disk and the backups, so that a restart repeats
-- nothing. `subject` is the first part of the message's type: ledger, disk or backup.
CREATE TABLE told (
    subject             TEXT PRIMARY KEY,
    type                TEXT NOT NULL,          -- of the last message, such as disk.low
    told_at             INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

ALTER TABLE keys ADD COLUMN
    expiry_told         INTEGER;                -- the expires_at that its account was told; NULL: none
CREATE INDEX keys_by_expiry ON keys (expires_at) WHERE expires_at IS NOT NULL AND revoked_at IS NULL;

-- Types of messages and a kind of notices that are new; see version 14.
PRAGMA writable_schema = ON;
UPDATE sqlite_schema
   SET sql = replace(sql, '''upstream.back'',',
                     '''upstream.back'', ''ledger.unhealthy'', ''ledger.back'', ''disk.low'', ''disk.room'',
                      ''backup.failed'', ''backup.overdue'', ''backup.made'', ''key.expiring'',')
 WHERE type = 'table' AND name = 'webhook_messages';
UPDATE sqlite_schema
   SET sql = replace(sql, '''incident'', ''budget'')', '''incident'', ''budget'', ''key'')')
 WHERE type = 'table' AND name = 'notices';
PRAGMA writable_schema = RESET;

DROP TRIGGER a_notice_is_added;
CREATE TRIGGER a_notice_is_added AFTER INSERT ON notices WHEN NEW.kind NOT IN ('budget', 'key') BEGIN
    INSERT INTO changes VALUES (NULL, (SELECT at FROM acting), (SELECT name FROM acting), 'notice',
        NEW.id, NEW.account_id, NULL, json_object('kind', NEW.kind, 'text', NEW.text,
            'effective_at', NEW.effective_at, 'until', NEW.until,
            'refuses_requests', NEW.refuses_requests));
END;

CREATE TRIGGER the_operator_is_told AFTER INSERT ON webhook_messages
WHEN NEW.type IN ('ledger.unhealthy', 'ledger.back', 'disk.low', 'disk.room', 'backup.failed',
                  'backup.overdue', 'backup.made') BEGIN
    -- The INSERT OR IGNORE that adds a message would turn an INSERT OR REPLACE here into its like.
    DELETE FROM told WHERE subject = substr(NEW.type, 1, instr(NEW.type, '.') - 1);
    INSERT INTO told VALUES (
        substr(NEW.type, 1, instr(NEW.type, '.') - 1), NEW.type, NEW.created_at);
END;

-- The triggers below take the place of those of the same names.

-- triggers
--
-- These triggers name each kind of usage or each rate. They belong to the newest version and are made
-- anew by it, so that a section which adds a kind or a rate only adds its columns. A line with "kind"
-- in braces stands for one line for each field of Usage (redbtc/usage.py), a line with "rate" in braces
-- for one line for each rate (redbtc/rates.py).

DROP TRIGGER IF EXISTS a_request_is_settled;
CREATE TRIGGER a_request_is_settled AFTER UPDATE OF outcome ON requests
WHEN OLD.outcome = 'pending' AND NEW.outcome <> 'pending' BEGIN
    INSERT INTO usage_by_day (
        account_id, month, day, model, requested_model, key_id, requests, estimated, unreported,
        {kind},
        cost_units, cost_nanos)
    VALUES (
        NEW.account_id, NEW.month, NEW.started_at / 86400000,
        ifnull(NEW.model, NEW.requested_model), NEW.requested_model, NEW.key_id, 1,
        NEW.usage_source = 'estimated', NEW.usage_source = 'none',
        NEW.{kind},
        ifnull(NEW.cost / 1000000000, 0), ifnull(NEW.cost % 1000000000, 0))
    ON CONFLICT DO UPDATE SET
        requests = requests + 1,
        estimated = estimated + excluded.estimated,
        unreported = unreported + excluded.unreported,
        {kind} = coalesce({kind} + excluded.{kind}, {kind}, excluded.{kind}),
        cost_units = cost_units + excluded.cost_units,
        cost_nanos = cost_nanos + excluded.cost_nanos;
END;

-- The difference is added to the sums of the day on which the request started.
DROP TRIGGER IF EXISTS a_request_is_corrected;
CREATE TRIGGER a_request_is_corrected AFTER INSERT ON corrections BEGIN
    DELETE FROM estimates WHERE request_id = NEW.request_id;
    INSERT INTO usage_by_day (
        account_id, month, day, model, requested_model, key_id, requests, estimated, unreported,
        {kind},
        cost_units, cost_nanos)
        SELECT r.account_id, NEW.month, r.started_at / 86400000, ifnull(r.model, r.requested_model),
               r.requested_model, r.key_id, 0, -(r.month = NEW.month), 0,
               nullif(ifnull(NEW.{kind}, 0) - ifnull(r.{kind}, 0), 0),
               (ifnull(NEW.cost, 0) - ifnull(r.cost, 0)) / 1000000000,
               (ifnull(NEW.cost, 0) - ifnull(r.cost, 0)) % 1000000000
          FROM requests AS r WHERE r.request_id = NEW.request_id
    ON CONFLICT DO UPDATE SET
        estimated = estimated + excluded.estimated,
        {kind} = coalesce({kind} + excluded.{kind}, {kind}, excluded.{kind}),
        cost_units = cost_units + excluded.cost_units,
        cost_nanos = cost_nanos + excluded.cost_nanos;
    INSERT INTO usage_by_month
        SELECT r.account_id, NEW.month, 0, ifnull(NEW.input_tokens, 0) - ifnull(r.input_tokens, 0),
               ifnull(NEW.output_tokens, 0) - ifnull(r.output_tokens, 0),
               (ifnull(NEW.cost, 0) - ifnull(r.cost, 0)) / 1000000000,
               (ifnull(NEW.cost, 0) - ifnull(r.cost, 0)) % 1000000000
          FROM requests AS r WHERE r.request_id = NEW.request_id
    ON CONFLICT DO UPDATE SET
        input_tokens = input_tokens + excluded.input_tokens,
        output_tokens = output_tokens + excluded.output_tokens,
        cost_units = cost_units + excluded.cost_units,
        cost_nanos = cost_nanos + excluded.cost_nanos;
    UPDATE traffic_by_day SET
        cost_units = cost_units + (SELECT (ifnull(NEW.cost, 0) - ifnull(r.cost, 0)) / 1000000000
            FROM requests AS r WHERE r.request_id = NEW.request_id),
        cost_nanos = cost_nanos + (SELECT (ifnull(NEW.cost, 0) - ifnull(r.cost, 0)) % 1000000000
            FROM requests AS r WHERE r.request_id = NEW.request_id)
     WHERE (day, upstream, outcome) = (SELECT r.started_at / 86400000, r.upstream, r.outcome
            FROM requests AS r WHERE r.request_id = NEW.request_id);
END;

DROP TRIGGER IF EXISTS a_request_is_reopened;
CREATE TRIGGER a_request_is_reopened AFTER INSERT ON reopened BEGIN
    UPDATE usage_by_day SET
        requests = requests - 1,
        estimated = estimated - (r.usage_source = 'estimated'),
        unreported = unreported - (r.usage_source = 'none'),
        {kind} = usage_by_day.{kind} - ifnull(r.{kind}, 0),
        cost_units = cost_units - ifnull(r.cost / 1000000000, 0),
        cost_nanos = cost_nanos - ifnull(r.cost % 1000000000, 0)
      FROM requests AS r
     WHERE r.request_id = NEW.request_id
       AND day = r.started_at / 86400000 AND usage_by_day.account_id = r.account_id
       AND usage_by_day.month = r.month
       AND usage_by_day.model = ifnull(r.model, r.requested_model)
       AND usage_by_day.requested_model = r.requested_model AND usage_by_day.key_id = r.key_id;
    UPDATE usage_by_month SET
        requests = requests - 1,
        input_tokens = usage_by_month.input_tokens - ifnull(r.input_tokens, 0),
        output_tokens = usage_by_month.output_tokens - ifnull(r.output_tokens, 0),
        cost_units = cost_units - ifnull(r.cost / 1000000000, 0),
        cost_nanos = cost_nanos - ifnull(r.cost % 1000000000, 0)
      FROM requests AS r
     WHERE r.request_id = NEW.request_id
       AND usage_by_month.account_id = r.account_id AND usage_by_month.month = r.month;
    UPDATE traffic_by_day SET
        requests = requests - 1,
        cost_units = cost_units - ifnull(r.cost / 1000000000, 0),
        cost_nanos = cost_nanos - ifnull(r.cost % 1000000000, 0)
      FROM requests AS r
     WHERE r.request_id = NEW.request_id AND day = r.started_at / 86400000
       AND traffic_by_day.upstream = r.upstream AND traffic_by_day.outcome = r.outcome;
    DELETE FROM estimates WHERE request_id = NEW.request_id;
    UPDATE requests SET outcome = 'pending' WHERE request_id = NEW.request_id;
END;

DROP TRIGGER IF EXISTS corrections_stay;
CREATE TRIGGER corrections_stay BEFORE UPDATE ON corrections
WHEN NOT ((NEW.request_id, NEW.account_id, NEW.service_tier, NEW.price_id,
           NEW.{kind},
           NEW.cost)
          IS (OLD.request_id, OLD.account_id, OLD.service_tier, OLD.price_id,
           OLD.{kind},
           OLD.cost)
      AND NEW.created_at IS min(OLD.created_at, (SELECT at FROM setting_time))
      AND NEW.month IS min(OLD.month, (SELECT month FROM setting_time)))
 AND NOT ((NEW.request_id, NEW.account_id, NEW.service_tier, NEW.price_id,
           NEW.{kind},
           NEW.cost, NEW.created_at, NEW.month)
          IS (OLD.request_id, OLD.account_id, OLD.service_tier, OLD.price_id,
           OLD.{kind},
           OLD.cost, OLD.created_at, OLD.month)
      AND EXISTS (SELECT 1 FROM erasing WHERE what = 'usage'))
BEGIN SELECT RAISE(ABORT, 'a correction can''t be changed'); END;

DROP TRIGGER IF EXISTS a_price_is_added;
CREATE TRIGGER a_price_is_added AFTER INSERT ON prices BEGIN
    INSERT INTO changes VALUES (NULL, (SELECT at FROM acting), (SELECT name FROM acting), 'price',
        NEW.id, NULL, NULL, json_object('model', NEW.model, 'tier', NEW.tier,
            'above_input_tokens', NEW.above_input_tokens, 'effective_at', NEW.effective_at,
            '{rate}', NEW.{rate},
            'max_output_tokens', NEW.max_output_tokens, 'source', NEW.source,
            'reason', NEW.reason));
END;

-- A price that took effect later than this time, but no later than it was added, took effect at once.
DROP TRIGGER IF EXISTS prices_stay;
CREATE TRIGGER prices_stay BEFORE UPDATE ON prices
WHEN NOT ((NEW.id, NEW.model, NEW.tier, NEW.above_input_tokens,
           NEW.{rate},
           NEW.max_output_tokens, NEW.currency, NEW.source, NEW.added_by, NEW.reason)
          IS (OLD.id, OLD.model, OLD.tier, OLD.above_input_tokens,
           OLD.{rate},
           OLD.max_output_tokens, OLD.currency, OLD.source, OLD.added_by, OLD.reason)
      AND NEW.created_at IS min(OLD.created_at, (SELECT at FROM setting_time))
      AND NEW.effective_at IS iif(OLD.effective_at <= OLD.created_at,
           min(OLD.effective_at, (SELECT at FROM setting_time)), OLD.effective_at))
BEGIN SELECT RAISE(ABORT, 'a price can''t be changed, only superseded'); END;
