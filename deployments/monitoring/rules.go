package main

import (
	"fmt"
	"strings"
	"time"

	"go.yaml.in/yaml/v3"
)

// Group is a Prometheus rule group. A recording rule and the alerts that read
// it are in one group: across groups an alert sees the value of the evaluation
// before.
type Group struct {
	Name  string `yaml:"name"`
	Rules []Rule `yaml:"rules"`
}

// Rule is a recording rule or an alert.
type Rule struct {
	Record      string            `yaml:"record,omitempty"`
	Alert       string            `yaml:"alert,omitempty"`
	Expr        string            `yaml:"expr"`
	For         string            `yaml:"for,omitempty"`
	Labels      map[string]string `yaml:"labels,omitempty"`
	Annotations map[string]string `yaml:"annotations,omitempty"`
}

// runbooks is where the pages are found.
const runbooks = "https://github.com/idenza/fingerprint-prefetch/blob/main/deployments/monitoring/runbooks/"

// pace divides every duration in the rules. 1 is what is deployed; the drills
// run the same rules faster.
type pace int

func (p pace) of(d time.Duration) string {
	d = max(d/time.Duration(p), 5*time.Second)
	switch {
	case d%(24*time.Hour) == 0:
		return fmt.Sprintf("%dd", d/(24*time.Hour))
	case d%time.Hour == 0:
		return fmt.Sprintf("%dh", d/time.Hour)
	case d%time.Minute == 0:
		return fmt.Sprintf("%dm", d/time.Minute)
	}
	return fmt.Sprintf("%ds", d/time.Second)
}

func (p pace) seconds(d time.Duration) string { return fmt.Sprint(d.Seconds() / float64(p)) }

// The service level objectives, over 30 days.
const (
	// availabilityObjective is the share of requests that are not answered
	// with our own trouble. A client's fault or a key's rate is no trouble of
	// ours.
	availabilityObjective = 0.999
	// freshnessObjective is the share of accepted events whose end can be
	// read within a minute; a dead letter is the end of one that claims
	// another subscriber's id. A minute because the vendor's 404 is believed
	// only after 30 s of asking again; what it does know takes far less.
	freshnessObjective = 0.99
)

// burnWindows are those of the SRE workbook, chapter 5: how fast the budget of
// 30 days burns before somebody is woken, or told.
var burnWindows = []struct {
	long, short time.Duration
	rate        float64
	severity    string
	wait        time.Duration
}{
	{time.Hour, 5 * time.Minute, 14.4, "critical", 2 * time.Minute},
	{6 * time.Hour, 30 * time.Minute, 6, "critical", 15 * time.Minute},
	{24 * time.Hour, 2 * time.Hour, 3, "warning", time.Hour},
	{72 * time.Hour, 6 * time.Hour, 1, "warning", 3 * time.Hour},
}

// burn returns the rules of one objective: the share of bad events over each
// window, and an alert for each pair of windows. bad is a query with %s where
// the window goes.
func (p pace) burn(name, record, bad string, objective float64, summary, description string) []Rule {
	var out []Rule
	of := func(d time.Duration) string { return "fp:" + record + ":rate" + pace(1).of(d) }
	recorded := map[time.Duration]bool{}
	for _, w := range burnWindows {
		for _, d := range []time.Duration{w.short, w.long} {
			if !recorded[d] {
				recorded[d] = true
				out = append(out, Rule{Record: of(d), Expr: strings.ReplaceAll(bad, "%s", p.of(d))})
			}
		}
	}
	for _, w := range burnWindows {
		limit := fmt.Sprintf("%.4g", w.rate*(1-objective))
		r := p.alert(name, w.severity, w.wait, fmt.Sprintf("%s > %s and %s > %s", of(w.long), limit, of(w.short), limit), summary,
			description+fmt.Sprintf(" {{ $value | humanizePercentage }} over the last %s: the budget of 30 days burns more than %g times as fast as it may.", pace(1).of(w.long), w.rate))
		r.Labels["window"] = pace(1).of(w.long)
		out = append(out, r)
	}
	return out
}

func (p pace) alert(name, severity string, wait time.Duration, expr, summary, description string) Rule {
	r := Rule{
		Alert: name, Expr: strings.Join(strings.Fields(expr), " "), Labels: map[string]string{"severity": severity},
		Annotations: map[string]string{"summary": summary, "description": description, "runbook_url": runbooks + name + ".md"},
	}
	if wait > 0 {
		r.For = p.of(wait)
	}
	return r
}

// Groups returns all rules. Every expression sums over instances by namespace,
// so that several pipelines may share a Prometheus.
func Groups(p pace) []Group {
	const (
		critical = "critical"
		warning  = "warning"
		minute   = time.Minute
	)
	// The collector runs in several places; any one that sees a durable will do.
	durable := func(metric, selector string) string {
		return "max by (namespace, stream, consumer) (" + metric + selector + ")"
	}
	const (
		lives = `{consumer=~"prefetcher|persister"}`
		works = `{consumer!="persister-pending"}`
	)
	window, quarter, hour := p.of(5*minute), p.of(15*minute), p.of(time.Hour)
	ratio := func(metric, bad string) string {
		return "sum by (namespace) (rate(" + metric + bad + "[" + window + "])) / sum by (namespace) (rate(" + metric + "[" + window + "]))"
	}
	// Where anything of ours runs and this is not reported. A plain absent is
	// blind to a namespace that lost it while another has it; it is left for
	// where nothing of ours is scraped at all.
	const running = "group by (namespace) (fp_build_info) unless on (namespace) "
	missing := func(series string) string { return running + series + " or on () absent(" + series + ")" }
	var without, absent []string
	for _, s := range []string{"ingest", "prefetcher", "persister", "exporter"} {
		ready := `fp_ready{service="` + s + `"}`
		without = append(without, "label_replace("+running+ready+`, "service", "`+s+`", "", "")`)
		absent = append(absent, "absent("+ready+")")
	}

	const (
		accepted = `sum by (namespace) (rate(fp_ingest_requests_total{outcome="accepted"}[%s] offset 1m))`
		ended    = `sum by (namespace) (rate(fp_pipeline_end_to_end_seconds_bucket{le=~"60|60.0"}[%s]))`
		foreign  = `sum by (namespace) (rate(fp_stage_dead_lettered_total{consumer="persister",reason="foreign_subscriber"}[%s]))`
	)

	return []Group{
		{"fp-ingest", append(
			p.burn("FPIngestAvailabilityBurn", "ingest_bad_ratio",
				`sum by (namespace) (rate(fp_ingest_requests_total{outcome=~"unavailable|overloaded|error"}[%s])) / sum by (namespace) (rate(fp_ingest_requests_total[%s]))`,
				availabilityObjective, "Clients are answered 503 or 500", "The edge fails requests for reasons of ours:"),
			p.alert("FPIngestKeysFileBroken", warning, 5*minute, `min by (namespace) (fp_ingest_keys_current) == 0`,
				"The edge cannot use its keys file", "The last edit of INGEST_API_KEYS_FILE is refused. The keys from before it are in force: a revoked one still works, a new one does not."),
		)},
		{"fp-freshness", append(
			p.burn("FPFreshnessBurn", "freshness_bad_ratio",
				// Against what was accepted a minute ago, so that a lost event
				// counts as bad, and none when nothing arrives any more. An id of
				// another subscriber's has its end in FP_DEAD, and no client shall
				// wake anybody by it; what persister-backfill gives up is a copy.
				"clamp_min(1 - (("+ended+" or 0 * "+accepted+") + ("+foreign+" or 0 * "+accepted+")) / "+accepted+", 0)",
				freshnessObjective, "Accepted events are late or lost", "Accepted events without a readable end after a minute:"),
			// Heartbeats keep their own period, whatever the pace.
			p.alert("FPHeartbeatMissing", critical, 2*minute,
				`time() - max by (namespace) (fp_stage_heartbeat_timestamp_seconds{stage="persister"}) > 60 or `+missing(`fp_stage_heartbeat_timestamp_seconds{stage="persister"}`),
				"No heartbeat comes through the pipeline", "The persister has written no heartbeat of the last minute. One is sent every 15 s, and events take the same way."),
		)},
		{"fp-lag", []Rule{
			p.alert("FPLagHigh", warning, 2*minute, durable("fp_consumer_undelivered_seconds", `{consumer=~"prefetcher|persister|persister-pending"}`)+" > "+p.seconds(15*time.Second),
				"{{ $labels.consumer }} is behind", "The oldest event nobody was handed yet has waited {{ $value | humanizeDuration }} for {{ $labels.consumer }}."),
			p.alert("FPLagHigh", critical, 2*minute, durable("fp_consumer_undelivered_seconds", lives)+" > "+p.seconds(time.Minute),
				"{{ $labels.consumer }} is far behind", "The oldest event nobody was handed yet has waited {{ $value | humanizeDuration }} for {{ $labels.consumer }}. Scorers find no data."),
			p.alert("FPEventStuck", warning, 5*minute, durable("fp_consumer_lag_seconds", lives)+" > "+p.seconds(10*minute)+" unless "+durable("fp_consumer_undelivered_seconds", lives)+" > "+p.seconds(15*time.Second),
				"{{ $labels.consumer }} holds an event it cannot finish", "One event is unfinished after {{ $value | humanizeDuration }}, although {{ $labels.consumer }} keeps up with the others."),
			p.alert("FPConsumerStalled", critical, 2*minute,
				durable("fp_consumer_undelivered_seconds", `{consumer!="prefetcher-backfill"}`)+" > "+p.seconds(30*time.Second)+
					" and max by (namespace, stream, consumer) (changes(fp_consumer_delivered_sequence["+p.of(2*minute)+"])) == 0"+
					" unless on (namespace, consumer) max by (namespace, consumer) (fp_stage_holding) == 1",
				"Nobody takes events for {{ $labels.consumer }}", "Events wait for {{ $labels.consumer }}, the oldest for {{ $value | humanizeDuration }}, nothing is delivered, and no stage says that it holds: it is stopped, frozen, scaled to zero or paused."),
			p.alert("FPConsumerPaused", warning, time.Hour, durable("fp_consumer_paused", "")+" == 1",
				"{{ $labels.consumer }} has been paused for an hour", "Somebody paused {{ $labels.consumer }} on the server. It ends by itself at the time given then; until then events wait."),
			p.alert("FPDataLossImminent", critical, 5*minute,
				durable("fp_consumer_lag_seconds", works)+" / on (namespace, stream) group_left max by (namespace, stream) (fp_stream_max_age_seconds > 0) > 0.25",
				"Events will expire before {{ $labels.consumer }} has seen them", "The oldest unfinished event of {{ $labels.consumer }} has reached {{ $value | humanizePercentage }} of the age at which {{ $labels.stream }} drops it. The prefetcher gives events up at a third of it."),
			p.alert("FPStreamFilling", critical, 5*minute,
				`max by (namespace, stream) (fp_stream_size_bytes) / max by (namespace, stream) (fp_stream_limit_bytes > 0) > 0.9`,
				"{{ $labels.stream }} is almost full", "{{ $labels.stream }} is at {{ $value | humanizePercentage }} of its size limit and will refuse messages. Finished history is purged from 80 % on, so this is unfinished, or too young to go."),
			p.alert("FPUnprocessedExpired", critical, 0,
				"max by (namespace, stream, consumer) (increase(fp_consumer_unprocessed_expired_total"+works+"["+hour+"])) > 0",
				"Events were lost to the age limit", "{{ $value | humanize }} events of {{ $labels.stream }} expired before {{ $labels.consumer }} had finished them."),
			p.alert("FPCollectorBlind", critical, 2*minute,
				`time() - max by (namespace) (fp_stream_collector_last_success_timestamp_seconds) > `+p.seconds(2*minute)+` or `+missing("fp_stream_collector_last_success_timestamp_seconds"),
				"Nobody can read the streams", "For two minutes nobody has read lag and fill completely. Every alert on lag works with old numbers until somebody does."),
		}},
		{"fp-stages", []Rule{
			p.alert("FPAbsent", critical, 2*minute, "("+strings.Join(without, " or ")+") or on (service) ("+strings.Join(absent, " or ")+")",
				"{{ $labels.service }} reports nothing", "No instance of {{ $labels.service }} is scraped: it is down, scaled to zero, or Prometheus cannot reach it."),
			p.alert("FPNotReady", critical, 2*minute, `max by (namespace, service) (fp_ready unless fp_draining == 1) == 0`,
				"No instance of {{ $labels.service }} is ready", "Every instance of {{ $labels.service }} lacks something it depends on; /readyz says what."),
			p.alert("FPDeadLetters", warning, 0, `sum by (namespace, consumer, reason) (increase(fp_stage_dead_lettered_total{reason=~"undecodable|poison|unwritable"}[`+quarter+`])) > 0`,
				"{{ $labels.consumer }} gave events up as {{ $labels.reason }}", "{{ $value | humanize }} events in the last quarter of an hour. None of these reasons is a client's doing."),
			p.alert("FPForeignSubscribers", warning, 10*minute,
				`sum by (namespace) (rate(fp_stage_dead_lettered_total{reason="foreign_subscriber"}[`+quarter+`])) / sum by (namespace) (rate(fp_ingest_requests_total{outcome="accepted"}[`+quarter+`])) > 0.01`,
				"Clients send ids that belong to other subscribers", "{{ $value | humanizePercentage }} of the accepted events claim a request id whose record belongs to another subscriber."),
			p.alert("FPExhausted", critical, 0, `sum by (namespace, consumer) (increase(fp_stage_dead_lettered_total{reason="exhausted"}[`+quarter+`])) > 0`,
				"Events were given up for their age", "{{ $value | humanize }} events passed PREFETCH_MAX_AGE in the last quarter of an hour and ended as failed. They lie in FP_DEAD."),
			p.alert("FPPublishRefused", critical, minute, `sum by (namespace, outcome) (rate(fp_publishes_total{outcome=~"full|refused|too_large"}[`+window+`])) > 0`,
				"A stream refuses messages ({{ $labels.outcome }})", "full: at its size limit, clients are answered 503 or a stage holds. refused: the subject is bound elsewhere. too_large: a bug."),
			p.alert("FPNATSDisconnected", critical, minute, `min by (namespace, instance) (fp_nats_connected) == 0`,
				"{{ $labels.instance }} has no connection to NATS", "It reconnects by itself. Until then it accepts and finishes nothing."),
			p.alert("FPNATSRefused", warning, 0, `sum by (namespace, kind) (increase(fp_nats_async_errors_total{kind=~"permission|auth"}[`+quarter+`])) > 0`,
				"NATS refuses something ({{ $labels.kind }})", "A user lacks a right or a credential. The call itself only times out, so nothing else shows it."),
		}},
		{"fp-vendor", []Rule{
			p.alert("FPVendorDown", critical, 2*minute, `max by (namespace, consumer) (fp_stage_holding{cause="fingerprint"}) == 1`,
				"The Fingerprint API does not answer", "{{ $labels.consumer }} holds: calls for several different ids failed in a row. Events wait in the stream; none is given up before PREFETCH_MAX_AGE."),
			p.alert("FPConfigurationFault", critical, minute, `max by (namespace, consumer) (fp_stage_holding{cause="configuration"}) == 1`,
				"The vendor refuses our key or region", "{{ $labels.consumer }} holds until FINGERPRINT_API_KEY or FINGERPRINT_REGION is right; a key file is read again without a restart."),
			p.alert("FPVendorErrors", warning, 10*minute, ratio("fp_prefetch_calls_total", `{outcome=~"transient|malformed"}`)+" > 0.1",
				"Calls to the vendor fail", "{{ $value | humanizePercentage }} of the calls time out, break or answer nonsense."),
			p.alert("FPVendorThrottles", warning, 5*minute, ratio("fp_prefetch_calls_total", `{outcome="throttled"}`)+" > 0.05",
				"The vendor answers 429", "{{ $value | humanizePercentage }} of the calls are over the vendor's limit: FINGERPRINT_RATE_LIMIT is above it, or somebody else uses the same workspace."),
			p.alert("FPQuotaExhausted", warning, 10*minute, `max by (namespace) (min_over_time(fp_prefetch_quota_waiting{priority="first_look"}[`+window+`])) > 0`,
				"Clients send more than the vendor's quota allows", "New events have waited for a call without a break for five minutes. What is older than PREFETCH_FRESH_WITHIN moves to FP_BACKFILL, and has no quota left there either."),
			p.alert("FPQuotaNotShared", warning, 5*minute, `min by (namespace) (fp_prefetch_quota_shared) == 0 and count by (namespace) (fp_prefetch_quota_shared) > 1`,
				"Replicas do not share the vendor's quota", "A prefetcher keeps to its own share: Redis is away, or REDIS_URL is not set. Calls go to waste when load is uneven."),
		}},
		{"fp-redis", []Rule{
			p.alert("FPRedisDown", critical, minute, `max by (namespace) (fp_stage_holding{cause="redis"}) == 1 or min by (namespace) (fp_dependency_up{dependency="redis"}) == 0`,
				"The persister cannot reach Redis", "Records are written nowhere, and wait in FP_ENRICHED. Nothing is lost, and scorers find no new data."),
			p.alert("FPRedisSlow", warning, 10*minute, `histogram_quantile(0.99, sum by (namespace, le) (rate(fp_persist_batch_duration_seconds_bucket[`+window+`]))) > 0.1`,
				"Redis is slow", "One in a hundred batches of records takes longer than {{ $value | humanizeDuration }}."),
		}},
	}
}

// rulesYAML is a rule file as Prometheus reads it.
func rulesYAML(groups []Group) ([]byte, error) {
	b, err := yaml.Marshal(map[string]any{"groups": groups})
	if err != nil {
		return nil, fmt.Errorf("write rules: %w", err)
	}
	return append([]byte(generated), b...), nil
}

const generated = "# Written by `go run ./deployments/monitoring`; do not edit.\n"
