DROP TRIGGER IF EXISTS a_request_is_settled;
CREATE TRIGGER a_request_is_settled AFTER UPDATE OF outcome ON requests
WHEN OLD.outcome = 'pending' AND NEW.outcome <> 'pending' BEGIN
    INSERT INTO usage_by_day (
        account_id, month, day, model, requested_model, key_id, requests, estimated, unreported,
        input_tokens,
        cached_input_tokens,
        cache_write_tokens,
        output_tokens,
        reasoning_tokens,
        image_input_tokens,
        image_output_tokens,
        web_searches,
        tool_input_tokens,
        cache_write_12h_tokens,
        file_searches,
        containers,
        audio_input_tokens,
        audio_output_tokens,
        audio_ms,
        characters,
        cost_units, cost_nanos)
    VALUES (
        NEW.account_id, NEW.month, NEW.started_at / 86400000,
        ifnull(NEW.model, NEW.requested_model), NEW.requested_model, NEW.key_id, 1,
        NEW.usage_source = 'estimated', NEW.usage_source = 'none',
        NEW.input_tokens,
        NEW.cached_input_tokens,
        NEW.cache_write_tokens,
        NEW.output_tokens,
        NEW.reasoning_tokens,
        NEW.image_input_tokens,
        NEW.image_output_tokens,
        NEW.web_searches,
        NEW.tool_input_tokens,
        NEW.cache_write_12h_tokens,
        NEW.file_searches,
        NEW.containers,
        NEW.audio_input_tokens,
        NEW.audio_output_tokens,
        NEW.audio_ms,
        NEW.characters,
        ifnull(NEW.cost / 1000000000, 0), ifnull(NEW.cost % 1000000000, 0))
    ON CONFLICT DO UPDATE SET
        requests = requests + 1,
        estimated = estimated + excluded.estimated,
        unreported = unreported + excluded.unreported,
        input_tokens = coalesce(input_tokens + excluded.input_tokens, input_tokens, excluded.input_tokens),
        cached_input_tokens = coalesce(cached_input_tokens + excluded.cached_input_tokens, cached_input_tokens, excluded.cached_input_tokens),
        cache_write_tokens = coalesce(cache_write_tokens + excluded.cache_write_tokens, cache_write_tokens, excluded.cache_write_tokens),
        output_tokens = coalesce(output_tokens + excluded.output_tokens, output_tokens, excluded.output_tokens),
        reasoning_tokens = coalesce(reasoning_tokens + excluded.reasoning_tokens, reasoning_tokens, excluded.reasoning_tokens),
        image_input_tokens = coalesce(image_input_tokens + excluded.image_input_tokens, image_input_tokens, excluded.image_input_tokens),
        image_output_tokens = coalesce(image_output_tokens + excluded.image_output_tokens, image_output_tokens, excluded.image_output_tokens),
        web_searches = coalesce(web_searches + excluded.web_searches, web_searches, excluded.web_searches),
        tool_input_tokens = coalesce(tool_input_tokens + excluded.tool_input_tokens, tool_input_tokens, excluded.tool_input_tokens),
        cache_write_12h_tokens = coalesce(cache_write_12h_tokens + excluded.cache_write_12h_tokens, cache_write_12h_tokens, excluded.cache_write_12h_tokens),
        file_searches = coalesce(file_searches + excluded.file_searches, file_searches, excluded.file_searches),
        containers = coalesce(containers + excluded.containers, containers, excluded.containers),
        audio_input_tokens = coalesce(audio_input_tokens + excluded.audio_input_tokens, audio_input_tokens, excluded.audio_input_tokens),
        audio_output_tokens = coalesce(audio_output_tokens + excluded.audio_output_tokens, audio_output_tokens, excluded.audio_output_tokens),
        audio_ms = coalesce(audio_ms + excluded.audio_ms, audio_ms, excluded.audio_ms),
        characters = coalesce(characters + excluded.characters, characters, excluded.characters),
        cost_units = cost_units + excluded.cost_units,
        cost_nanos = cost_nanos + excluded.cost_nanos;
END;

DROP TRIGGER IF EXISTS a_request_is_corrected;
CREATE TRIGGER a_request_is_corrected AFTER INSERT ON corrections BEGIN
    DELETE FROM estimates WHERE request_id = NEW.request_id;
    INSERT INTO usage_by_day (
        account_id, month, day, model, requested_model, key_id, requests, estimated, unreported,
        input_tokens,
        cached_input_tokens,
        cache_write_tokens,
        output_tokens,
        reasoning_tokens,
        image_input_tokens,
        image_output_tokens,
        web_searches,
        tool_input_tokens,
        cache_write_12h_tokens,
        file_searches,
        containers,
        audio_input_tokens,
        audio_output_tokens,
        audio_ms,
        characters,
        cost_units, cost_nanos)
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
               nullif(ifnull(NEW.tool_input_tokens, 0) - ifnull(r.tool_input_tokens, 0), 0),
               nullif(ifnull(NEW.cache_write_12h_tokens, 0) - ifnull(r.cache_write_12h_tokens, 0), 0),
               nullif(ifnull(NEW.file_searches, 0) - ifnull(r.file_searches, 0), 0),
               nullif(ifnull(NEW.containers, 0) - ifnull(r.containers, 0), 0),
               nullif(ifnull(NEW.audio_input_tokens, 0) - ifnull(r.audio_input_tokens, 0), 0),
               nullif(ifnull(NEW.audio_output_tokens, 0) - ifnull(r.audio_output_tokens, 0), 0),
               nullif(ifnull(NEW.audio_ms, 0) - ifnull(r.audio_ms, 0), 0),
               nullif(ifnull(NEW.characters, 0) - ifnull(r.characters, 0), 0),
               (ifnull(NEW.cost, 0) - ifnull(r.cost, 0)) / 1000000000,
               (ifnull(NEW.cost, 0) - ifnull(r.cost, 0)) % 1000000000
          FROM requests AS r WHERE r.request_id = NEW.request_id
    ON CONFLICT DO UPDATE SET
        estimated = estimated + excluded.estimated,
        input_tokens = coalesce(input_tokens + excluded.input_tokens, input_tokens, excluded.input_tokens),
        cached_input_tokens = coalesce(cached_input_tokens + excluded.cached_input_tokens, cached_input_tokens, excluded.cached_input_tokens),
        cache_write_tokens = coalesce(cache_write_tokens + excluded.cache_write_tokens, cache_write_tokens, excluded.cache_write_tokens),
        output_tokens = coalesce(output_tokens + excluded.output_tokens, output_tokens, excluded.output_tokens),
        reasoning_tokens = coalesce(reasoning_tokens + excluded.reasoning_tokens, reasoning_tokens, excluded.reasoning_tokens),
        image_input_tokens = coalesce(image_input_tokens + excluded.image_input_tokens, image_input_tokens, excluded.image_input_tokens),
        image_output_tokens = coalesce(image_output_tokens + excluded.image_output_tokens, image_output_tokens, excluded.image_output_tokens),
        web_searches = coalesce(web_searches + excluded.web_searches, web_searches, excluded.web_searches),
        tool_input_tokens = coalesce(tool_input_tokens + excluded.tool_input_tokens, tool_input_tokens, excluded.tool_input_tokens),
        cache_write_12h_tokens = coalesce(cache_write_12h_tokens + excluded.cache_write_12h_tokens, cache_write_12h_tokens, excluded.cache_write_12h_tokens),
        file_searches = coalesce(file_searches + excluded.file_searches, file_searches, excluded.file_searches),
        containers = coalesce(containers + excluded.containers, containers, excluded.containers),
        audio_input_tokens = coalesce(audio_input_tokens + excluded.audio_input_tokens, audio_input_tokens, excluded.audio_input_tokens),
        audio_output_tokens = coalesce(audio_output_tokens + excluded.audio_output_tokens, audio_output_tokens, excluded.audio_output_tokens),
        audio_ms = coalesce(audio_ms + excluded.audio_ms, audio_ms, excluded.audio_ms),
        characters = coalesce(characters + excluded.characters, characters, excluded.characters),
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
        audio_input_tokens = usage_by_day.audio_input_tokens - ifnull(r.audio_input_tokens, 0),
        audio_output_tokens = usage_by_day.audio_output_tokens - ifnull(r.audio_output_tokens, 0),
        audio_ms = usage_by_day.audio_ms - ifnull(r.audio_ms, 0),
        characters = usage_by_day.characters - ifnull(r.characters, 0),
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
           NEW.input_tokens,
           NEW.cached_input_tokens,
           NEW.cache_write_tokens,
           NEW.output_tokens,
           NEW.reasoning_tokens,
           NEW.image_input_tokens,
           NEW.image_output_tokens,
           NEW.web_searches,
           NEW.tool_input_tokens,
           NEW.cache_write_12h_tokens,
           NEW.file_searches,
           NEW.containers,
           NEW.audio_input_tokens,
           NEW.audio_output_tokens,
           NEW.audio_ms,
           NEW.characters,
           NEW.cost)
          IS (OLD.request_id, OLD.account_id, OLD.service_tier, OLD.price_id,
           OLD.input_tokens,
           OLD.cached_input_tokens,
           OLD.cache_write_tokens,
           OLD.output_tokens,
           OLD.reasoning_tokens,
           OLD.image_input_tokens,
           OLD.image_output_tokens,
           OLD.web_searches,
           OLD.tool_input_tokens,
           OLD.cache_write_12h_tokens,
           OLD.file_searches,
           OLD.containers,
           OLD.audio_input_tokens,
           OLD.audio_output_tokens,
           OLD.audio_ms,
           OLD.characters,
           OLD.cost)
      AND NEW.created_at IS min(OLD.created_at, (SELECT at FROM setting_time))
      AND NEW.month IS min(OLD.month, (SELECT month FROM setting_time)))
BEGIN SELECT RAISE(ABORT, 'a correction can''t be changed'); END;

DROP TRIGGER IF EXISTS a_price_is_added;
CREATE TRIGGER a_price_is_added AFTER INSERT ON prices BEGIN
    INSERT INTO changes VALUES (NULL, (SELECT at FROM acting), (SELECT name FROM acting), 'price',
        NEW.id, NULL, NULL, json_object('model', NEW.model, 'tier', NEW.tier,
            'above_input_tokens', NEW.above_input_tokens, 'effective_at', NEW.effective_at,
            'input', NEW.input,
            'cached_input', NEW.cached_input,
            'cache_write', NEW.cache_write,
            'cache_write_12h', NEW.cache_write_12h,
            'output', NEW.output,
            'image_input', NEW.image_input,
            'image_output', NEW.image_output,
            'web_search', NEW.web_search,
            'file_search', NEW.file_search,
            'container', NEW.container,
            'audio_input', NEW.audio_input,
            'audio_output', NEW.audio_output,
            'audio_minute', NEW.audio_minute,
            'characters', NEW.characters,
            'max_output_tokens', NEW.max_output_tokens, 'source', NEW.source,
            'reason', NEW.reason));
END;

DROP TRIGGER IF EXISTS prices_stay;
CREATE TRIGGER prices_stay BEFORE UPDATE ON prices
WHEN NOT ((NEW.id, NEW.model, NEW.tier, NEW.above_input_tokens,
           NEW.input,
           NEW.cached_input,
           NEW.cache_write,
           NEW.cache_write_12h,
           NEW.output,
           NEW.image_input,
           NEW.image_output,
           NEW.web_search,
           NEW.file_search,
           NEW.container,
           NEW.audio_input,
           NEW.audio_output,
           NEW.audio_minute,
           NEW.characters,
           NEW.max_output_tokens, NEW.currency, NEW.source, NEW.added_by, NEW.reason)
          IS (OLD.id, OLD.model, OLD.tier, OLD.above_input_tokens,
           OLD.input,
           OLD.cached_input,
           OLD.cache_write,
           OLD.cache_write_12h,
           OLD.output,
           OLD.image_input,
           OLD.image_output,
           OLD.web_search,
           OLD.file_search,
           OLD.container,
           OLD.audio_input,
           OLD.audio_output,
           OLD.audio_minute,
           OLD.characters,
           OLD.max_output_tokens, OLD.currency, OLD.source, OLD.added_by, OLD.reason)
      AND NEW.created_at IS min(OLD.created_at, (SELECT at FROM setting_time))
      AND NEW.effective_at IS iif(OLD.effective_at <= OLD.created_at,
           min(OLD.effective_at, (SELECT at FROM setting_time)), OLD.effective_at))
BEGIN SELECT RAISE(ABORT, 'a price can''t be changed, only superseded'); END;
