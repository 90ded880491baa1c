//go:build checkops

package main

import (
	"fmt"
	"slices"
	"strings"
	"time"
)

// A ruleCase is an alert, what makes it fire, and what nearly does. Series are
// in promtool's notation, one value a minute.
type ruleCase struct {
	alert, severity, window string
	// labels are further matchers of the alert that is looked for.
	labels string
	// fires makes the alert fire as soon as its wait is over.
	fires []string
	// not lists states of the world in which it never does.
	not [][]string
	// step is the time between values, a minute by default.
	step time.Duration
	// at is when fires is looked at, if not two steps after wait; not is
	// looked at then, or after notAt.
	at, notAt time.Duration
	// early is when fires does not make it fire yet, if not one step before
	// its wait is over.
	early time.Duration
}

func cases() []ruleCase {
	const (
		ingestAll   = `fp_ingest_requests_total{outcome="accepted"} 0+1000x200`
		on          = ` 1x200`
		off         = ` 0x200`
		undelivered = `fp_consumer_undelivered_seconds{stream="FP_ENRICHED",consumer="persister",instance="%s"} %s`
		delivered   = `fp_consumer_delivered_sequence{stream="FP_ENRICHED",consumer="persister",instance="%s"} %s`
		lag         = `fp_consumer_lag_seconds{stream="FP_ENRICHED",consumer="persister",instance="%s"} %s`
	)
	f := fmt.Sprintf
	stands, moves := f(delivered, "a", "7x200"), f(delivered, "a", "0+3x200")
	up := func(names ...string) (out []string) {
		for _, n := range names {
			out = append(out, `fp_build_info{service="`+n+`"}`+on, `fp_ready{service="`+n+`"}`+on)
		}
		return out
	}
	// in is series of one namespace of several.
	in := func(namespace string, series ...string) (out []string) {
		for _, s := range series {
			name, rest, found := strings.Cut(s, "{")
			if !found {
				name, rest, _ = strings.Cut(s, " ")
				rest = "} " + rest
			}
			out = append(out, name+`{namespace="`+namespace+`",`+rest)
		}
		return out
	}
	const (
		heartbeat = `fp_stage_heartbeat_timestamp_seconds{stage="persister"} 0+60x200`
		collected = `fp_stream_collector_last_success_timestamp_seconds 0+60x200`
	)
	all := up("ingest", "prefetcher", "persister", "exporter")
	calls := func(outcome string, perMinute int) string {
		return f(`fp_prefetch_calls_total{outcome=%q} 0+%dx200`, outcome, perMinute)
	}
	slow := func(fast, all int) []string {
		return []string{
			f(`fp_persist_batch_duration_seconds_bucket{le="0.05"} 0+%dx200`, fast), f(`fp_persist_batch_duration_seconds_bucket{le="0.5"} 0+%dx200`, all),
			f(`fp_persist_batch_duration_seconds_bucket{le="+Inf"} 0+%dx200`, all),
		}
	}
	dead := func(reason, values string) string {
		return f(`fp_stage_dead_lettered_total{consumer="prefetcher",reason=%q} %s`, reason, values)
	}
	readable := func(perMinute int) string {
		return f(`fp_pipeline_end_to_end_seconds_bucket{mode="live",le="60"} 0+%dx200`, perMinute)
	}
	foreign := func(consumer string, perMinute int) string {
		return f(`fp_stage_dead_lettered_total{consumer=%q,reason="foreign_subscriber"} 0+%dx200`, consumer, perMinute)
	}
	restart := "5x20 0x180" // a process that came back

	out := []ruleCase{
		{alert: "FPIngestKeysFileBroken", severity: "warning",
			fires: []string{`fp_ingest_keys_current{instance="a"}` + on, `fp_ingest_keys_current{instance="b"}` + off},
			not:   [][]string{{`fp_ingest_keys_current` + on}, {`fp_ingest_keys_current 1x10 0x3 1x100`}}},

		// Another subscriber's id has its end, as far as it got there; a copy's
		// says nothing about what is accepted.
		{alert: "FPFreshnessBurn", severity: "critical", window: "1h", at: 14 * time.Minute,
			fires: []string{ingestAll, readable(300), foreign("persister", 300)},
			not:   [][]string{{ingestAll, readable(500), foreign("persister", 500)}, {ingestAll, foreign("persister", 1000)}}},
		{alert: "FPFreshnessBurn", severity: "critical", window: "1h", at: 14 * time.Minute,
			fires: []string{ingestAll, readable(500), foreign("persister-backfill", 500), `fp_stage_dead_lettered_total{consumer="persister",reason="poison"} 0+500x200`}},
		{alert: "FPHeartbeatMissing", severity: "critical",
			fires: []string{`fp_stage_heartbeat_timestamp_seconds{stage="persister"} 0x200`, `fp_stage_heartbeat_timestamp_seconds{stage="exporter"} 0+60x200`}, at: 5 * time.Minute,
			not: [][]string{
				{`fp_stage_heartbeat_timestamp_seconds{stage="persister",instance="a"} 0x200`, `fp_stage_heartbeat_timestamp_seconds{stage="persister",instance="b"} -40+60x200`},
			}},
		{alert: "FPHeartbeatMissing", severity: "critical", fires: []string{`fp_stage_heartbeat_timestamp_seconds{stage="exporter"} 0+60x200`}},
		// Ten minutes late, which is more than one and less than two orders off.
		{alert: "FPHeartbeatMissing", severity: "critical", fires: []string{`fp_stage_heartbeat_timestamp_seconds{stage="persister"} -300+60x200`}},

		{alert: "FPHeartbeatMissing", severity: "critical", fires: all, not: [][]string{append(slices.Clone(all), heartbeat)}},
		{alert: "FPHeartbeatMissing", severity: "critical", labels: `namespace="b"`,
			fires: slices.Concat(in("a", append(slices.Clone(all), heartbeat)...), in("b", all...)),
			not:   [][]string{slices.Concat(in("a", append(slices.Clone(all), heartbeat)...), in("b", append(slices.Clone(all), heartbeat)...))}},

		{alert: "FPLagHigh", severity: "warning",
			fires: []string{f(undelivered, "a", "30x200"), f(undelivered, "b", "0x200")},
			not: [][]string{{f(undelivered, "a", "10x200")}, {f(undelivered, "a", "0x5 30x1 0x100")},
				{`fp_consumer_undelivered_seconds{stream="FP_BACKFILL",consumer="persister-backfill"} 9000x200`}}},
		{alert: "FPLagHigh", severity: "critical",
			fires: []string{f(undelivered, "a", "90x200"), f(undelivered, "b", "0x200")},
			not: [][]string{{f(undelivered, "a", "50x200")}, {f(undelivered, "a", "0x5 90x1 0x100")},
				{`fp_consumer_undelivered_seconds{stream="FP_INGEST",consumer="persister-pending"} 9000x200`}}},
		{alert: "FPEventStuck", severity: "warning",
			fires: []string{f(lag, "a", "900x200"), f(lag, "b", "0x200"), f(undelivered, "a", "5x200")},
			not: [][]string{
				{f(lag, "a", "300x200"), f(undelivered, "a", "0x200")},                                 // a 404 is asked for again
				{f(lag, "a", "900x200"), f(undelivered, "a", "100x200"), f(undelivered, "b", "0x200")}, // all of them wait
			}},
		{alert: "FPEventStuck", severity: "warning", fires: []string{f(lag, "a", "900x200"), f(undelivered, "a", "14x200")}},
		{alert: "FPConsumerStalled", severity: "critical", at: 5 * time.Minute,
			fires: []string{f(undelivered, "a", "100x200"), f(undelivered, "b", "0x200"), stands},
			not: [][]string{
				{f(undelivered, "a", "100x200"), moves},
				{f(undelivered, "a", "100x200"), moves, f(delivered, "b", "7x200")}, // one instance knows an old number
				{f(undelivered, "a", "20x200"), stands},
				{f(undelivered, "a", "0x200"), stands}, // nothing to do
				{f(undelivered, "a", "100x200"), stands, `fp_stage_holding{consumer="persister",cause="redis"}` + on, `fp_stage_holding{consumer="persister",cause="nats"}` + off},
				{`fp_consumer_undelivered_seconds{stream="FP_BACKFILL",consumer="prefetcher-backfill"} 9000x200`, `fp_consumer_delivered_sequence{stream="FP_BACKFILL",consumer="prefetcher-backfill"} 7x200`},
			}},
		{alert: "FPConsumerStalled", severity: "critical", at: 5 * time.Minute,
			fires: []string{f(undelivered, "a", "100x200"), stands, `fp_stage_holding{consumer="persister",cause="redis"}` + off, `fp_stage_holding{consumer="prefetcher",cause="redis"}` + on}},
		{alert: "FPConsumerPaused", severity: "warning",
			fires: []string{`fp_consumer_paused{stream="FP_INGEST",consumer="prefetcher",instance="a"}` + on, `fp_consumer_paused{stream="FP_INGEST",consumer="prefetcher",instance="b"}` + off},
			not:   [][]string{{`fp_consumer_paused{stream="FP_INGEST",consumer="prefetcher"}` + off}, {`fp_consumer_paused{stream="FP_INGEST",consumer="prefetcher"} 0x5 1x50 0x100`}}},
		{alert: "FPDataLossImminent", severity: "critical",
			fires: []string{f(lag, "a", "80000x200"), f(lag, "b", "0x200"), `fp_stream_max_age_seconds{stream="FP_ENRICHED",instance="a"} 259200x200`, `fp_stream_max_age_seconds{stream="FP_ENRICHED",instance="b"} 259200x200`},
			not: [][]string{
				{f(lag, "a", "20000x200"), `fp_stream_max_age_seconds{stream="FP_ENRICHED"} 259200x200`},
				{f(lag, "a", "80000x200"), `fp_stream_max_age_seconds{stream="FP_ENRICHED"} 0x200`}, // no limit
				{`fp_consumer_lag_seconds{stream="FP_INGEST",consumer="persister-pending"} 80000x200`, `fp_stream_max_age_seconds{stream="FP_INGEST"} 259200x200`},
			}},
		// While a limit is being changed instances differ; the longest is in force.
		{alert: "FPDataLossImminent", severity: "critical", fires: []string{f(lag, "a", "200000x200"), `fp_stream_max_age_seconds{stream="FP_ENRICHED"} 259200x200`},
			not: [][]string{{f(lag, "a", "80000x200"), `fp_stream_max_age_seconds{stream="FP_ENRICHED",instance="a"} 259200x200`, `fp_stream_max_age_seconds{stream="FP_ENRICHED",instance="b"} 900000x200`}}},
		// A small limit is one as well.
		{alert: "FPStreamFilling", severity: "critical", fires: []string{`fp_stream_size_bytes{stream="FP_DEAD"} 4.8x200`, `fp_stream_limit_bytes{stream="FP_DEAD"} 5x200`}},
		{alert: "FPDataLossImminent", severity: "critical", fires: []string{f(lag, "a", "3x200"), `fp_stream_max_age_seconds{stream="FP_ENRICHED"} 5x200`}},
		{alert: "FPStreamFilling", severity: "critical",
			fires: []string{`fp_stream_size_bytes{stream="FP_DEAD",instance="a"} 95x200`, `fp_stream_size_bytes{stream="FP_DEAD",instance="b"} 10x200`, `fp_stream_limit_bytes{stream="FP_DEAD",instance="a"} 100x200`},
			not: [][]string{
				{`fp_stream_size_bytes{stream="FP_DEAD"} 50x200`, `fp_stream_limit_bytes{stream="FP_DEAD"} 100x200`},
				{`fp_stream_size_bytes{stream="FP_DEAD"} 95x200`, `fp_stream_limit_bytes{stream="FP_DEAD",instance="a"} 100x200`, `fp_stream_limit_bytes{stream="FP_DEAD",instance="b"} 200x200`},
				{`fp_stream_size_bytes{stream="FP_DEAD"} 95x200`, `fp_stream_limit_bytes{stream="FP_DEAD"} 0x200`},
			}},
		{alert: "FPUnprocessedExpired", severity: "critical", at: 12 * time.Minute,
			fires: []string{`fp_consumer_unprocessed_expired_total{stream="FP_INGEST",consumer="prefetcher",instance="a"} 0x9 3x200`, `fp_consumer_unprocessed_expired_total{stream="FP_INGEST",consumer="prefetcher",instance="b"} 0x200`},
			not: [][]string{
				{`fp_consumer_unprocessed_expired_total{stream="FP_INGEST",consumer="prefetcher"} ` + restart},
				{`fp_consumer_unprocessed_expired_total{stream="FP_INGEST",consumer="persister-pending"} 0x9 3x200`},
			}},
		{alert: "FPCollectorBlind", severity: "critical", at: 7 * time.Minute,
			fires: []string{`fp_stream_collector_last_success_timestamp_seconds 0x200`},
			not:   [][]string{{`fp_stream_collector_last_success_timestamp_seconds{instance="a"} 0x200`, `fp_stream_collector_last_success_timestamp_seconds{instance="b"} -60+60x200`}}},
		{alert: "FPCollectorBlind", severity: "critical", fires: []string{`fp_stream_collector_last_success_timestamp_seconds -300+60x200`}},
		{alert: "FPCollectorBlind", severity: "critical", fires: []string{`other 1x200`}},
		{alert: "FPCollectorBlind", severity: "critical", fires: all, not: [][]string{append(slices.Clone(all), collected)}},
		{alert: "FPCollectorBlind", severity: "critical", labels: `namespace="b"`,
			fires: slices.Concat(in("a", append(slices.Clone(all), collected)...), in("b", all...)),
			not:   [][]string{slices.Concat(in("a", append(slices.Clone(all), collected)...), in("b", append(slices.Clone(all), collected)...))}},

		{alert: "FPAbsent", severity: "critical", fires: up("ingest", "prefetcher", "persister"),
			not: [][]string{up("ingest", "prefetcher", "persister", "exporter"), append(up("ingest", "prefetcher", "exporter"), `fp_ready{service="persister"} 1x10 _x1 1x100`)}},
		{alert: "FPAbsent", severity: "critical", fires: up("exporter", "prefetcher", "persister"), labels: `service="ingest",namespace=""`},
		{alert: "FPAbsent", severity: "critical", fires: up("ingest", "exporter", "persister")},
		{alert: "FPAbsent", severity: "critical", fires: up("ingest", "prefetcher", "exporter")},
		// Two pipelines: one has lost its edge, and the other's hides nothing.
		{alert: "FPAbsent", severity: "critical", labels: `service="ingest",namespace="b"`,
			fires: slices.Concat(in("a", all...), in("b", up("exporter", "prefetcher", "persister")...)),
			not:   [][]string{slices.Concat(in("a", all...), in("b", all...)), slices.Concat(in("a", all...), in("b", up("ingest", "exporter")...))}},
		// Somebody is told once.
		{alert: "FPAbsent", severity: "critical", labels: `namespace=""`, not: [][]string{in("a", up("exporter", "prefetcher", "persister")...)}},
		{alert: "FPAbsent", severity: "critical", labels: `service="ingest"`, fires: []string{"other 1x200"}},
		{alert: "FPNotReady", severity: "critical",
			fires: []string{`fp_ready{service="ingest",instance="a"}` + off, `fp_ready{service="ingest",instance="b"}` + off, `fp_draining{service="ingest",instance="a"}` + off},
			not: [][]string{
				{`fp_ready{service="ingest",instance="a"}` + off, `fp_ready{service="ingest",instance="b"}` + on},
				{`fp_ready{service="ingest",instance="a"}` + off, `fp_draining{service="ingest",instance="a"}` + on},
				{`fp_ready{service="ingest"} 1x10 0x1 1x100`},
			}},
		{alert: "FPDeadLetters", severity: "warning", fires: []string{dead("undecodable", "0x3 1x200")}, at: 6 * time.Minute,
			not: [][]string{{dead("undecodable", restart)}, {dead("foreign_subscriber", "0+5x200")}, {dead("exhausted", "0+5x200")}}},
		{alert: "FPForeignSubscribers", severity: "warning", fires: []string{dead("foreign_subscriber", "0+50x200"), ingestAll},
			not: [][]string{{dead("foreign_subscriber", "0+5x200"), ingestAll}, {dead("foreign_subscriber", "0x200"), `fp_ingest_requests_total{outcome="accepted"} 0x200`}}},
		{alert: "FPExhausted", severity: "critical", fires: []string{dead("exhausted", "0x3 1x200")}, at: 6 * time.Minute,
			not: [][]string{{dead("exhausted", restart)}, {dead("undecodable", "0+5x200")}}},
		{alert: "FPPublishRefused", severity: "critical", fires: []string{`fp_publishes_total{outcome="full"} 0+1x200`}, early: time.Minute, // a rate takes a step to be there
			not: [][]string{{`fp_publishes_total{outcome="acked"} 0+1x200`, `fp_publishes_total{outcome="full"} ` + restart, `fp_publishes_total{outcome="unsure"} 0+1x200`}}},
		{alert: "FPNATSDisconnected", severity: "critical", fires: []string{`fp_nats_connected{instance="a"}` + off},
			not: [][]string{{`fp_nats_connected{instance="a"}` + on}, {`fp_nats_connected{instance="a"} 1x10 0 1x100`}}},
		// Two processes behind one address count as one: the worse.
		{alert: "FPNATSDisconnected", severity: "critical", fires: []string{`fp_nats_connected{instance="a",pod="1"}` + off, `fp_nats_connected{instance="a",pod="2"}` + on}},
		{alert: "FPNATSRefused", severity: "warning", fires: []string{`fp_nats_async_errors_total{kind="permission"} 0x3 1x200`}, at: 6 * time.Minute,
			not: [][]string{{`fp_nats_async_errors_total{kind="permission"} ` + restart}, {`fp_nats_async_errors_total{kind="slow_consumer"} 0+1x200`}}},

		{alert: "FPQuotaExhausted", severity: "warning",
			fires: []string{`fp_prefetch_quota_waiting{priority="first_look",instance="a"} 3x200`, `fp_prefetch_quota_waiting{priority="first_look",instance="b"} 0x200`},
			not:   [][]string{{`fp_prefetch_quota_waiting{priority="first_look"} 3x4 0 3x4 0 3x4 0 3x4 0 3x4 0`}, {`fp_prefetch_quota_waiting{priority="backfill"} 30x200`}}},
		{alert: "FPQuotaNotShared", severity: "warning", fires: []string{`fp_prefetch_quota_shared{instance="a"}` + off, `fp_prefetch_quota_shared{instance="b"}` + on},
			not: [][]string{{`fp_prefetch_quota_shared{instance="a"}` + off}, {`fp_prefetch_quota_shared{instance="a"}` + on, `fp_prefetch_quota_shared{instance="b"}` + on}}},
		{alert: "FPVendorErrors", severity: "warning", fires: []string{calls("found", 80), calls("transient", 20)},
			not: [][]string{{calls("found", 95), calls("transient", 5)}, {calls("found", 0), calls("transient", 0)}, {calls("found", 10), calls("not_found", 90)}}},
		{alert: "FPVendorThrottles", severity: "warning", fires: []string{calls("found", 80), calls("throttled", 20)},
			not: [][]string{{calls("found", 98), calls("throttled", 2)}, {calls("found", 0), calls("throttled", 0)}}},

		{alert: "FPRedisDown", severity: "critical", fires: []string{`fp_stage_holding{consumer="persister",cause="redis",instance="a"}` + on, `fp_stage_holding{consumer="persister",cause="redis",instance="b"}` + off},
			not: [][]string{{`fp_stage_holding{consumer="persister",cause="redis"}` + off, `fp_dependency_up{dependency="redis"}` + on}, {`fp_dependency_up{dependency="consumer persister"}` + off}, {`fp_dependency_up{dependency="redis"} 1x10 0 1x100`}}},
		{alert: "FPRedisDown", severity: "critical", fires: []string{`fp_dependency_up{dependency="redis",instance="a"}` + off, `fp_dependency_up{dependency="redis",instance="b"}` + on}},
		{alert: "FPRedisSlow", severity: "warning", fires: slow(50, 100), not: [][]string{slow(100, 100), slow(0, 0)}},
	}
	for alert, cause := range map[string]string{"FPVendorDown": "fingerprint", "FPConfigurationFault": "configuration"} {
		series := func(instance, values string) string {
			return f(`fp_stage_holding{consumer="prefetcher",cause=%q,instance=%q} %s`, cause, instance, values)
		}
		out = append(out, ruleCase{alert: alert, severity: "critical", fires: []string{series("a", on), series("b", off)},
			not: [][]string{{series("a", off)}, {`fp_stage_holding{consumer="persister",cause="redis"}` + on}, {series("a", "0x9 1 0x100")}}})
	}
	return append(append(out, burnCases("FPIngestAvailabilityBurn", 1-availabilityObjective, func(bad ...segment) []string {
		return []string{counter(`fp_ingest_requests_total{outcome="unavailable"}`, bad...), counter(`fp_ingest_requests_total{outcome="accepted"}`, others(bad)...)}
	})...), burnCases("FPFreshnessBurn", 1-freshnessObjective, func(bad ...segment) []string {
		all := make([]segment, len(bad))
		for i, s := range bad {
			all[i] = segment{perStep, s.steps}
		}
		return []string{counter(`fp_ingest_requests_total{outcome="accepted"}`, all...), counter(`fp_pipeline_end_to_end_seconds_bucket{mode="live",le="60"}`, others(bad)...)}
	})...)
}

// segment is a part of a counter's life: so much more each step.
type segment struct {
	rate  float64
	steps int
}

// perStep is the traffic of the burn cases.
const perStep = 1e6

func others(bad []segment) []segment {
	out := make([]segment, len(bad))
	for i, s := range bad {
		out[i] = segment{perStep - s.rate, s.steps}
	}
	return out
}

func counter(series string, segments ...segment) string {
	b := &strings.Builder{}
	b.WriteString(series)
	value := 0.0
	for _, s := range segments {
		fmt.Fprintf(b, " %.0f+%.0fx%d", value, s.rate, s.steps-1)
		value += s.rate * float64(s.steps)
	}
	return b.String()
}

// burnCases tries each pair of windows with a steady fire, with one that has
// only begun, and with one that is over; budget is the share that may be bad.
func burnCases(alert string, budget float64, series func(bad ...segment) []string) (out []ruleCase) {
	for _, w := range burnWindows {
		step := time.Minute
		if w.long > 6*time.Hour {
			step = 5 * time.Minute
		}
		steps := func(d time.Duration) int { return int(d / step) }
		bad := w.rate * budget * perStep
		long, short, wait := steps(w.long), steps(w.short), steps(w.wait)
		name := pace(1).of(w.long)
		out = append(out,
			ruleCase{alert: alert, severity: w.severity, window: name, step: step, at: w.wait + 12*step, fires: series(segment{5 * bad, long}),
				not: [][]string{series(segment{0, long}), series(segment{0.5 * bad, long})}},
			ruleCase{alert: alert, severity: w.severity, window: name, step: step, notAt: w.long + w.short, not: [][]string{series(segment{0, long}, segment{4 * bad, short + 9})}},
			ruleCase{alert: alert, severity: w.severity, window: name, step: step, notAt: w.long + w.short + w.wait + 5*step, not: [][]string{series(segment{3 * bad, long}, segment{bad / 2, short + wait + 9})}},
		)
	}
	return out
}

// calm are states of the whole pipeline in which no alert fires at all.
func calm() map[string][]string {
	base := func(instance string, traffic int) []string {
		out := []string{
			`fp_stage_heartbeat_timestamp_seconds{stage="persister"} 0+60x300`,
			`fp_stream_collector_last_success_timestamp_seconds 0+60x300`,
			`fp_ingest_keys_current 1x300`,
			`fp_dependency_up{dependency="redis"} 1x300`,
			`fp_prefetch_quota_waiting{priority="first_look"} 0x300`,
			`fp_prefetch_quota_shared 0x300`,
			fmt.Sprintf(`fp_ingest_requests_total{outcome="accepted"} 0+%dx300`, traffic),
			`fp_ingest_requests_total{outcome="unavailable"} 0x300`,
			`fp_ingest_requests_total{outcome="unauthorized"} 0+50x300`, // a stranger
			fmt.Sprintf(`fp_pipeline_end_to_end_seconds_bucket{mode="live",le="60"} 0+%dx300`, traffic),
			fmt.Sprintf(`fp_prefetch_calls_total{outcome="found"} 0+%dx300`, traffic),
			`fp_prefetch_calls_total{outcome="throttled"} 0x300`,
			`fp_stage_dead_lettered_total{consumer="prefetcher",reason="exhausted"} 0x300`,
			`fp_stage_dead_lettered_total{consumer="persister",reason="foreign_subscriber"} 0x300`,
			`fp_nats_async_errors_total{kind="permission"} 0x300`,
			`fp_publishes_total{outcome="full"} 0x300`,
			`fp_persist_batch_duration_seconds_bucket{le="0.05"} 0+60x300`, `fp_persist_batch_duration_seconds_bucket{le="+Inf"} 0+60x300`,
		}
		for _, s := range services {
			out = append(out, fmt.Sprintf(`fp_build_info{service=%q,instance=%q} 1x300`, s, instance), fmt.Sprintf(`fp_ready{service=%q,instance=%q} 1x300`, s, instance), fmt.Sprintf(`fp_draining{service=%q,instance=%q} 0x300`, s, instance), fmt.Sprintf(`fp_nats_connected{instance="%s-%s"} 1x300`, instance, s))
		}
		for durable, stream := range map[string]string{"prefetcher": "FP_INGEST", "persister": "FP_ENRICHED", "persister-pending": "FP_INGEST", "prefetcher-backfill": "FP_BACKFILL", "persister-backfill": "FP_BACKFILL"} {
			l := fmt.Sprintf(`{stream=%q,consumer=%q,instance=%q}`, stream, durable, instance)
			out = append(out, "fp_consumer_undelivered_seconds"+l+" 0x300", "fp_consumer_lag_seconds"+l+" 0x300", "fp_consumer_paused"+l+" 0x300",
				"fp_consumer_delivered_sequence"+l+" 0+4x300", "fp_consumer_unprocessed_expired_total"+l+" 0x300")
			out = append(out, fmt.Sprintf(`fp_stage_holding{consumer=%q,cause="redis"} 0x300`, durable), fmt.Sprintf(`fp_stage_holding{consumer=%q,cause="fingerprint"} 0x300`, durable))
		}
		for _, s := range []string{"FP_INGEST", "FP_ENRICHED", "FP_BACKFILL"} {
			out = append(out, `fp_stream_max_age_seconds{stream="`+s+`"} 259200x300`, `fp_stream_size_bytes{stream="`+s+`"} 100x300`, `fp_stream_limit_bytes{stream="`+s+`"} 1000x300`)
		}
		return out
	}
	with := func(series []string, name, values string) []string {
		out := append([]string(nil), series...)
		found := false
		for i, s := range out {
			if strings.HasPrefix(s, name+" ") {
				out[i], found = name+" "+values, true
			}
		}
		if !found {
			panic("no series " + name)
		}
		return out
	}
	quiet, busy := base("a", 0), base("a", 600)
	// Three hours of events are fetched again, and their ends are late by
	// nature.
	replay := with(busy, `fp_consumer_undelivered_seconds{stream="FP_BACKFILL",consumer="prefetcher-backfill",instance="a"}`, "0x30 10000x200 0x20")
	replay = with(replay, `fp_consumer_lag_seconds{stream="FP_BACKFILL",consumer="prefetcher-backfill",instance="a"}`, "0x30 10000x200 0x20")
	replay = with(replay, `fp_consumer_delivered_sequence{stream="FP_BACKFILL",consumer="prefetcher-backfill",instance="a"}`, "0x300")
	replay = append(replay, `fp_pipeline_end_to_end_seconds_bucket{mode="backfill",le="60"} 0x300`, `fp_pipeline_end_to_end_seconds_bucket{mode="backfill",le="+Inf"} 0+300x300`)
	// One rollout: counters begin anew, a minute without a scrape, short waits.
	restart := with(busy, `fp_ingest_requests_total{outcome="accepted"}`, "0+600x100 _ 0+600x200")
	restart = with(restart, `fp_pipeline_end_to_end_seconds_bucket{mode="live",le="60"}`, "0+600x100 _ 0+600x200")
	restart = with(restart, `fp_stage_dead_lettered_total{consumer="prefetcher",reason="exhausted"}`, "9x100 _ 0x200")
	restart = with(restart, `fp_ready{service="persister",instance="a"}`, "1x100 0 _ 1x200")
	restart = with(restart, `fp_draining{service="persister",instance="a"}`, "0x100 1 _ 0x200")
	restart = with(restart, `fp_stage_heartbeat_timestamp_seconds{stage="persister"}`, "0+60x100 _ 6060+60x200")
	restart = with(restart, `fp_consumer_undelivered_seconds{stream="FP_ENRICHED",consumer="persister",instance="a"}`, "0x100 20 0x200")
	restart = with(restart, `fp_nats_connected{instance="a-persister"}`, "1x100 _ 0 1x200")
	return map[string][]string{"quiet": quiet, "busy": busy, "replay": replay, "restart": restart}
}
