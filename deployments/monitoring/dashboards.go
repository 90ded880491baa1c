package main

import (
	"encoding/json"
	"fmt"
	"strings"
)

// Dashboard is one page of Grafana.
type Dashboard struct {
	UID, Title string
	Panels     []Panel
}

// Panel is one picture. Every one has a unit and says what bad looks like.
type Panel struct {
	Title, Unit string
	// Bad is the description.
	Bad string
	// Kind is timeseries unless set: stat or state-timeline.
	Kind string
	// Wide panels take the whole width.
	Wide    bool
	Queries []Query
	// Alerts whose runbooks the panel links to.
	Alerts []string
}

// Query is one expression and what its lines are called. In Expr, {$} and ,$}
// stand for the variables' selectors.
type Query struct{ Expr, Legend string }

func q(expr, legend string) Query { return Query{expr, legend} }

// rate is a counter's rate per second, summed by labels.
func rate(metric, selector string, by ...string) string {
	if selector != "" {
		selector += ","
	}
	return fmt.Sprintf("sum by (%s) (rate(%s{%s$}[$__rate_interval]))", strings.Join(by, ", "), metric, selector)
}

// worst is a gauge's largest value by labels.
func worst(metric, selector string, by ...string) string {
	if selector != "" {
		selector += ","
	}
	return fmt.Sprintf("max by (%s) (%s{%s$})", strings.Join(by, ", "), metric, selector)
}

// quantiles are those of a histogram, by labels.
func quantiles(metric, selector string, by ...string) []Query {
	var out []Query
	var legend strings.Builder
	for _, l := range by {
		legend.WriteString(" {{" + l + "}}")
	}
	for _, n := range []string{"0.5", "0.95", "0.99"} {
		out = append(out, q(fmt.Sprintf("histogram_quantile(%s, %s)", n, rate(metric+"_bucket", selector, append([]string{"le"}, by...)...)), "p"+strings.TrimPrefix(n, "0.")+legend.String()))
	}
	return out
}

// Dashboards returns all pages.
func Dashboards() []Dashboard {
	lag := worst("fp_consumer_undelivered_seconds", "", "consumer")
	return []Dashboard{
		{"fp-overview", "Fingerprint prefetch: overview", []Panel{
			{Title: "Firing alerts", Unit: "short", Kind: "stat", Bad: "Anything but 0; the alerts' runbooks say what to do.",
				Queries: []Query{q(`sum(ALERTS{alertname=~"FP.*",alertstate="firing"}) or vector(0)`, "firing")}},
			{Title: "Heartbeat", Unit: "s", Kind: "stat", Bad: "Above 60 s: the pipeline does not pass events from end to end. One is sent every 15 s.",
				Queries: []Query{q(`time() - `+worst("fp_stage_heartbeat_timestamp_seconds", "", "stage"), "{{stage}}")}, Alerts: []string{"FPHeartbeatMissing"}},
			{Title: "Ready instances", Unit: "short", Kind: "stat", Bad: "0, or fewer than are meant to run. A draining instance is not ready and that is fine.",
				Queries: []Query{q("sum by (service) (fp_ready{$})", "{{service}}"), q("sum by (service) (fp_draining{$})", "{{service}} draining")}, Alerts: []string{"FPNotReady", "FPAbsent"}},
			{Title: "Versions", Unit: "short", Kind: "stat", Bad: "Two versions for longer than a rollout takes.",
				Queries: []Query{q("count by (service, version) (fp_build_info{$})", "{{service}} {{version}}")}},
			{Title: "Accepted to readable", Unit: "s", Bad: "p95 above 10 s live: scorers find pending. Ids the vendor does not know take 30 s by design; backfill is late by nature.",
				Queries: quantiles("fp_pipeline_end_to_end_seconds", "", "mode"), Alerts: []string{"FPFreshnessBurn"}},
			{Title: "Late or lost, share of accepted", Unit: "percentunit", Bad: "Above 1 % for long: the objective is that 99 % are readable within a minute. Lost events count, and ids of another subscriber's do not.",
				Queries: []Query{q(`fp:freshness_bad_ratio:rate5m{namespace=~"$namespace"}`, "5m"), q(`fp:freshness_bad_ratio:rate1h{namespace=~"$namespace"}`, "1h")}, Alerts: []string{"FPFreshnessBurn"}},
			{Title: "Lag of what was handed to nobody", Unit: "s", Bad: "A straight line upwards, one second a second: nobody takes events. Above 15 s live is late; backfill waits by design.",
				Queries: []Query{q(lag, "{{consumer}}")}, Alerts: []string{"FPLagHigh", "FPConsumerStalled"}},
			{Title: "A stage holds", Unit: "short", Kind: "state-timeline", Bad: "1: the stage waits for what the cause names and gives nothing up.",
				Queries: []Query{q(worst("fp_stage_holding", "", "consumer", "cause"), "{{consumer}} {{cause}}")}, Alerts: []string{"FPVendorDown", "FPConfigurationFault", "FPRedisDown"}},
			{Title: "Events a second, in and out of each stage", Unit: "cps", Wide: true, Bad: "Out below in for longer than a peak: a backlog grows. Dead letters above 0.",
				Queries: []Query{q(rate("fp_ingest_requests_total", `outcome="accepted"`), "accepted"), q(rate("fp_stage_received_total", "", "consumer"), "{{consumer}} in"), q(rate("fp_stage_events_total", `outcome="acked"`, "consumer"), "{{consumer}} out"), q(rate("fp_stage_dead_lettered_total", "", "consumer"), "{{consumer}} dead")}},
			{Title: "The sum: stored = ended + waiting (last hour)", Unit: "short", Wide: true, Bad: "Stored above ended plus what came to wait, for longer than a scrape: an event has no end. A process killed hard takes its last counts along.",
				Queries: []Query{
					q(`sum(max by (namespace, stream) (increase(fp_stream_last_sequence{stream=~"FP_INGEST|FP_BACKFILL",$}[1h]))) - sum(increase(fp_prefetch_moved_total{$}[1h]))`, "stored, replays included"),
					q(`sum(increase(fp_persist_records_total{status!="pending",$}[1h])) + sum(increase(fp_prefetch_skipped_total{reason!="retention",$}[1h])) + sum(increase(fp_stage_dead_lettered_total{reason="undecodable",$}[1h])) + (sum(increase(fp_stage_dead_lettered_total{consumer=~"persister.*",reason="poison",$}[1h])) or vector(0))`, "ended"),
					q(`sum(max by (namespace, consumer) (fp_consumer_lag_messages{consumer!="persister-pending",$} + fp_consumer_ack_pending_messages{consumer!="persister-pending",$}))`, "waiting"),
				}},
			{Title: "Requests failed by us", Unit: "percentunit", Bad: "Above 0.1 %: the objective is 99.9 %.",
				Queries: []Query{q(`fp:ingest_bad_ratio:rate5m{namespace=~"$namespace"}`, "5m"), q(`fp:ingest_bad_ratio:rate1h{namespace=~"$namespace"}`, "1h")}, Alerts: []string{"FPIngestAvailabilityBurn"}},
			{Title: "Dependencies", Unit: "short", Kind: "state-timeline", Bad: "0: the part did not answer when it was last asked.",
				Queries: []Query{q("min by (service, dependency) (fp_dependency_up{$})", "{{service}} {{dependency}}")}, Alerts: []string{"FPNotReady"}},
		}},
		{"fp-ingest", "Fingerprint prefetch: ingest", []Panel{
			{Title: "Answers", Unit: "reqps", Wide: true, Bad: "unavailable, overloaded or error at all; unauthorized or invalid far above a client's usual.",
				Queries: []Query{q(rate("fp_ingest_requests_total", "", "outcome"), "{{outcome}}")}, Alerts: []string{"FPIngestAvailabilityBurn"}},
			{Title: "Time to answer", Unit: "s", Bad: "p99 of accepted above 0.1 s: the stream acknowledges slowly. At 1.5 s the edge gives up.",
				Queries: quantiles("fp_ingest_request_duration_seconds", `outcome="accepted"`)},
			{Title: "Requests under way", Unit: "short", Bad: "Near INGEST_MAX_INFLIGHT (2048): more are answered 503.",
				Queries: []Query{q("sum by (instance) (fp_ingest_inflight_requests{$})", "{{instance}}")}},
			{Title: "Bodies refused", Unit: "cps", Bad: "One field and rule for long: a client sends something else than it means to.",
				Queries: []Query{q(rate("fp_ingest_invalid_fields_total", "", "field", "rule"), "{{field}} {{rule}}")}},
			{Title: "Keys refused", Unit: "cps", Bad: "mismatch or unknown in numbers: somebody guesses. expired: a client missed its rotation.",
				Queries: []Query{q(rate("fp_ingest_auth_failures_total", "", "reason"), "{{reason}}")}},
			{Title: "Requests by key", Unit: "reqps", Bad: "A key far above its usual, or refused for long.",
				Queries: []Query{q(rate("fp_ingest_key_requests_total", "", "key_id", "outcome"), "{{key_id}} {{outcome}}")}},
			{Title: "Keys", Unit: "short", Kind: "stat", Bad: "As file is 0: the last edit of the keys file is broken and the old keys are in force.",
				Queries: []Query{q("max by (instance) (fp_ingest_keys{$})", "{{instance}}"), q("min(fp_ingest_keys_current{$})", "as file")}, Alerts: []string{"FPIngestKeysFileBroken"}},
			{Title: "Publishes by what the stream said", Unit: "cps", Bad: "full, unavailable or unsure at all; refused or too_large ever.",
				Queries: []Query{q(rate("fp_publishes_total", "", "outcome"), "{{outcome}}")}, Alerts: []string{"FPPublishRefused"}},
			{Title: "Time to the stream's ack", Unit: "s", Bad: "p99 above 0.05 s: slow disks or a slow follower.",
				Queries: quantiles("fp_publish_duration_seconds", "")},
			{Title: "Connected to NATS", Unit: "short", Kind: "state-timeline", Bad: "0 for more than a moment.",
				Queries: []Query{q("min by (instance) (fp_nats_connected{$})", "{{instance}}")}, Alerts: []string{"FPNATSDisconnected"}},
			{Title: "Connections lost, won back, and refusals", Unit: "cps", Bad: "Lost and won back again and again: a flapping network. permission at all: a right is missing.",
				Queries: []Query{q(rate("fp_nats_disconnects_total", ""), "lost"), q(rate("fp_nats_reconnects_total", ""), "won back"), q(rate("fp_nats_async_errors_total", "", "kind"), "{{kind}}")}, Alerts: []string{"FPNATSRefused"}},
		}},
		{"fp-prefetcher", "Fingerprint prefetch: prefetcher and the vendor's quota", []Panel{
			{Title: "Calls to the vendor", Unit: "reqps", Wide: true, Bad: "throttled, transient or malformed in numbers; misconfigured at all; not_found far above its usual: forged ids.",
				Queries: []Query{q(rate("fp_prefetch_calls_total", "", "outcome"), "{{outcome}}")}, Alerts: []string{"FPVendorErrors", "FPVendorThrottles", "FPVendorDown"}},
			{Title: "Time of a call", Unit: "s", Bad: "p99 near FINGERPRINT_TIMEOUT (5 s).",
				Queries: quantiles("fp_prefetch_call_duration_seconds", "")},
			{Title: "Events waiting for a call", Unit: "short", Bad: "first_look above 0 for minutes: clients send more than the quota admits.",
				Queries: []Query{q("sum by (priority) (fp_prefetch_quota_waiting{$})", "{{priority}}")}, Alerts: []string{"FPQuotaExhausted"}},
			{Title: "Quota left", Unit: "short", Bad: "0 for minutes: all of it is spent.",
				Queries: []Query{q("max(fp_prefetch_quota_tokens{$})", "calls that may be made at once")}, Alerts: []string{"FPQuotaExhausted"}},
			{Title: "Wait for the quota", Unit: "s", Bad: "p95 above 1 s: the quota is the bottleneck.",
				Queries: quantiles("fp_prefetch_quota_wait_seconds", "")},
			{Title: "Who uses the quota", Unit: "reqps", Bad: "One key takes most of it.",
				Queries: []Query{q(rate("fp_ingest_key_requests_total", `outcome="accepted"`, "key_id"), "{{key_id}}")}, Alerts: []string{"FPQuotaExhausted"}},
			{Title: "Quota is shared", Unit: "short", Kind: "state-timeline", Bad: "0 with several replicas: each keeps to its own share. 0 is right for a single one without REDIS_URL.",
				Queries: []Query{q("min by (instance) (fp_prefetch_quota_shared{$})", "{{instance}}")}, Alerts: []string{"FPQuotaNotShared"}},
			{Title: "How events end", Unit: "cps", Bad: "failed at all; not_found or rejected far above their usual.",
				Queries: []Query{q(rate("fp_prefetch_results_total", "", "status", "reason"), "{{status}} {{reason}}")}, Alerts: []string{"FPExhausted"}},
			{Title: "Events that made way, or needed no call", Unit: "cps", Bad: "old for long: the quota does not suffice. crowded for long: one subscriber floods.",
				Queries: []Query{q(rate("fp_prefetch_moved_total", "", "reason"), "moved: {{reason}}"), q(rate("fp_prefetch_skipped_total", "", "reason"), "no call: {{reason}}"), q(rate("fp_prefetch_coalesced_total", ""), "shared a call")}},
			{Title: "Events in hand, and parked", Unit: "short", Bad: "Parked in the thousands: many ids the vendor does not know.",
				Queries: []Query{q(`sum by (consumer) (fp_stage_inflight_events{consumer=~"prefetcher.*",$})`, "{{consumer}} in hand"), q(`sum by (consumer) (fp_stage_parked_events{consumer=~"prefetcher.*",$})`, "{{consumer}} parked")}, Alerts: []string{"FPEventStuck"}},
			{Title: "Time in the stream and with the handler", Unit: "s", Bad: "Time in the stream grows while handling does not: too few calls at once, or too little quota.",
				Queries: append(quantiles("fp_stage_queue_wait_seconds", `consumer="prefetcher"`)[1:2], quantiles("fp_stage_processing_duration_seconds", `consumer="prefetcher"`)[1:2]...)},
		}},
		{"fp-persister", "Fingerprint prefetch: persister and Redis", []Panel{
			{Title: "Records by status and what became of them", Unit: "cps", Wide: true, Bad: "unreadable at all: something else writes to our keys. foreign in numbers: a client uses others' ids. failed at all.",
				Queries: []Query{q(rate("fp_persist_records_total", "", "status", "outcome"), "{{status}} {{outcome}}")}, Alerts: []string{"FPForeignSubscribers", "FPDeadLetters"}},
			{Title: "Time of a batch in Redis", Unit: "s", Bad: "p99 above 0.1 s.",
				Queries: quantiles("fp_persist_batch_duration_seconds", ""), Alerts: []string{"FPRedisSlow"}},
			{Title: "Records in a batch", Unit: "short", Bad: "At PERSIST_BATCH (256) all the time: the persister is at its limit.",
				Queries: quantiles("fp_persist_batch_records", "")},
			{Title: "Size of a record", Unit: "bytes", Bad: "A jump: the vendor's events grew, or RECORD_EVENT was changed.",
				Queries: quantiles("fp_persist_value_size_bytes", "")},
			{Title: "Redis answers", Unit: "short", Kind: "state-timeline", Bad: "0: nothing is written, events wait.",
				Queries: []Query{q(`min by (instance) (fp_dependency_up{dependency="redis",$})`, "{{instance}}")}, Alerts: []string{"FPRedisDown"}},
			{Title: "Time in the stream and with the handler", Unit: "s", Bad: "Time in the stream grows while handling does not: add replicas.",
				Queries: append(quantiles("fp_stage_queue_wait_seconds", `consumer=~"persister|persister-pending"`, "consumer")[1:2], quantiles("fp_stage_processing_duration_seconds", `consumer=~"persister|persister-pending"`, "consumer")[1:2]...)},
			{Title: "Given up, by reason", Unit: "cps", Bad: "undecodable, poison or unwritable at all.",
				Queries: []Query{q(rate("fp_stage_dead_lettered_total", `consumer=~"persister.*"`, "consumer", "reason"), "{{consumer}} {{reason}}")}, Alerts: []string{"FPDeadLetters"}},
		}},
		{"fp-streams", "Fingerprint prefetch: streams and backfill", []Panel{
			{Title: "Age of the oldest unfinished event", Unit: "s", Bad: "A straight line upwards. Up to 30 s at the prefetcher is an id the vendor does not know yet.",
				Queries: []Query{q(worst("fp_consumer_lag_seconds", "", "stream", "consumer"), "{{consumer}}")}, Alerts: []string{"FPEventStuck", "FPDataLossImminent"}},
			{Title: "Age of the oldest event handed to nobody", Unit: "s", Bad: "Above 15 s for a live durable.",
				Queries: []Query{q(worst("fp_consumer_undelivered_seconds", "", "stream", "consumer"), "{{consumer}}")}, Alerts: []string{"FPLagHigh"}},
			{Title: "Messages waiting and in hand", Unit: "short", Bad: "Waiting grows without end. In hand at 20,000: the server hands out no more.",
				Queries: []Query{q(worst("fp_consumer_lag_messages", "", "stream", "consumer"), "{{consumer}} waiting"), q(worst("fp_consumer_ack_pending_messages", "", "stream", "consumer"), "{{consumer}} in hand")}},
			{Title: "Stored and handed out", Unit: "cps", Bad: "Stored goes on and handed out stands at 0.",
				Queries: []Query{q(`max by (stream) (rate(fp_stream_last_sequence{$}[$__rate_interval]))`, "{{stream}} stored"), q(`max by (consumer) (rate(fp_consumer_delivered_sequence{$}[$__rate_interval]))`, "{{consumer}} handed out")}, Alerts: []string{"FPConsumerStalled"}},
			{Title: "Fill", Unit: "percentunit", Bad: "Above 80 % the exporter purges what is finished; above 90 % it found nothing to purge.",
				Queries: []Query{q(worst("fp_stream_size_bytes", "", "stream")+" / "+worst("fp_stream_limit_bytes", "", "stream"), "{{stream}}")}, Alerts: []string{"FPStreamFilling"}},
			{Title: "Messages, and finished ones purged", Unit: "short", Bad: "FP_DEAD grows: somebody has to look at it.",
				Queries: []Query{q(worst("fp_stream_messages", "", "stream"), "{{stream}}"), q("sum by (stream) (increase(fp_stream_purged_messages_total{$}[1h]))", "{{stream}} purged in an hour")}, Alerts: []string{"FPDeadLetters"}},
			{Title: "Share of the age limit used", Unit: "percentunit", Bad: "Above 25 %: events are given up at a third and dropped at the whole.",
				Queries: []Query{q(worst("fp_consumer_lag_seconds", "", "stream", "consumer")+" / on (stream) group_left "+worst("fp_stream_max_age_seconds", "", "stream"), "{{consumer}}")}, Alerts: []string{"FPDataLossImminent"}},
			{Title: "Lost to the age limit", Unit: "short", Kind: "stat", Bad: "Anything but 0.",
				Queries: []Query{q("max by (consumer) (increase(fp_consumer_unprocessed_expired_total{$}[1h]))", "{{consumer}}")}, Alerts: []string{"FPUnprocessedExpired"}},
			{Title: "Paused", Unit: "short", Kind: "state-timeline", Bad: "1 and nobody knows why.",
				Queries: []Query{q(worst("fp_consumer_paused", "", "consumer"), "{{consumer}}")}, Alerts: []string{"FPConsumerPaused"}},
			{Title: "Decisions", Unit: "cps", Bad: "held: the stage holds. handed_back outside a rollout.",
				Queries: []Query{q(rate("fp_stage_events_total", "", "consumer", "outcome"), "{{consumer}} {{outcome}}")}},
			{Title: "Redeliveries, and acks repeated", Unit: "cps", Bad: "Redeliveries outside a rollout: processes die or freeze.",
				Queries: []Query{q(rate("fp_stage_redeliveries_total", "", "consumer"), "{{consumer}} redelivered"), q(rate("fp_stage_ack_failures_total", "", "consumer"), "{{consumer}} acks repeated")}},
			{Title: "Backfill: accepted to readable", Unit: "s", Bad: "Nothing: replays and moved events are late by nature. Compare with what the replay says.",
				Queries: quantiles("fp_pipeline_end_to_end_seconds", `mode="backfill"`)},
			{Title: "Collectors", Unit: "s", Bad: "Every one above a minute: all of the above shows old numbers.",
				Queries: []Query{q("time() - max by (instance) (fp_stream_collector_last_success_timestamp_seconds{$})", "{{instance}} last complete"), q(rate("fp_stream_collector_errors_total", ""), "errors a second")}, Alerts: []string{"FPCollectorBlind"}},
		}},
	}
}

const selectors = `namespace=~"$namespace",instance=~"$instance"`

// expr is what Grafana sends.
func (q Query) expr() string {
	return strings.NewReplacer("{$}", "{"+selectors+"}", ",$}", ","+selectors+"}").Replace(q.Expr)
}

type object = map[string]any

// JSON is the page as Grafana imports it.
func (d Dashboard) JSON() ([]byte, error) {
	datasource := object{"type": "prometheus", "uid": "${datasource}"}
	variable := func(name, label string) object {
		return object{
			"name": name, "label": label, "type": "query", "datasource": datasource,
			"query":   object{"query": "label_values(fp_build_info, " + name + ")", "refId": name},
			"refresh": 2, "sort": 1, "multi": true, "includeAll": true, "allValue": ".*",
			"current": object{"text": "All", "value": "$__all"},
		}
	}
	var panels []object
	x, y := 0, 0
	for i, p := range d.Panels {
		width, height := 12, 8
		if p.Wide {
			width = 24
		}
		if x+width > 24 {
			x, y = 0, y+height
		}
		kind := p.Kind
		if kind == "" {
			kind = "timeseries"
		}
		var targets, links []object
		for n, query := range p.Queries {
			targets = append(targets, object{"refId": string(rune('A' + n)), "datasource": datasource, "expr": query.expr(), "legendFormat": query.Legend})
		}
		for _, a := range p.Alerts {
			links = append(links, object{"title": "Runbook " + a, "url": runbooks + a + ".md", "targetBlank": true})
		}
		options := object{}
		switch kind {
		case "timeseries":
			options = object{"legend": object{"displayMode": "list", "placement": "bottom", "showLegend": true}, "tooltip": object{"mode": "multi", "sort": "desc"}}
		case "stat":
			options = object{"colorMode": "none", "reduceOptions": object{"calcs": []string{"lastNotNull"}}, "textMode": "value_and_name"}
		}
		panels = append(panels, object{
			"id": i + 1, "title": p.Title, "type": kind, "description": p.Bad, "datasource": datasource,
			"gridPos": object{"x": x, "y": y, "w": width, "h": height}, "targets": targets, "links": links, "options": options,
			"fieldConfig": object{"defaults": object{"unit": p.Unit, "min": 0}, "overrides": []object{}},
		})
		x += width
	}
	b, err := json.MarshalIndent(object{
		"uid": d.UID, "title": d.Title, "tags": []string{"fingerprint-prefetch"}, "schemaVersion": 39, "editable": false,
		"timezone": "browser", "refresh": "30s", "time": object{"from": "now-3h", "to": "now"}, "graphTooltip": 1,
		"links": []object{
			{"title": "Fingerprint prefetch", "type": "dashboards", "tags": []string{"fingerprint-prefetch"}, "asDropdown": false, "includeVars": true, "keepTime": true},
			{"title": "Runbooks", "type": "link", "url": strings.TrimSuffix(runbooks, "/"), "targetBlank": true},
		},
		"templating": object{"list": []object{
			{"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus", "current": object{}},
			variable("namespace", "Namespace"), variable("instance", "Instance"),
		}},
		"panels": panels,
	}, "", " ")
	if err != nil {
		return nil, fmt.Errorf("write dashboard %s: %w", d.UID, err)
	}
	return append(b, '\n'), nil
}
