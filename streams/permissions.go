package streams

import (
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/idenza/fingerprint-prefetch/streams/record"
)

// The NATS users besides the stages, which are called like their service.
const (
	UserIngest = "ingest"
	// UserExporter watches every stream, purges what is finished, and sends
	// heartbeats.
	UserExporter = "exporter"
	// UserStreamctl creates streams and durables, replays and erases.
	UserStreamctl = "streamctl"
	// UserOperator looks and changes nothing. It may read messages, which hold
	// personal data: streamctl masks that, and shows it only to whoever may
	// write to FP_AUDIT, which this user may not; but another client can read
	// what this one masks.
	UserOperator = "operator"
	// UserBackup copies streams out, personal data included, and puts back those
	// that are not there: the server restores over nothing.
	UserBackup = "backup"
)

// Permissions is everything one NATS user may do; the server refuses the rest.
type Permissions struct {
	User string
	// Publish and Subscribe list subjects, wildcards included. Requests to
	// JetStream and acks are publishes.
	Publish, Subscribe []string
}

// AllPermissions returns the permissions of every user, derived from
// [Definition], so that code and permissions cannot drift apart.
//
// A user may subscribe to replies under the inbox prefix that [Connect] gives
// it, and so cannot read those to others. Nobody may delete a stream.
func AllPermissions() []Permissions {
	ingest := Permissions{User: UserIngest, Publish: []string{"$JS.API.STREAM.INFO." + StreamIngest}}
	prefetcher, persister := Permissions{User: StagePrefetcher}, Permissions{User: StagePersister}
	exporter := Permissions{User: UserExporter, Publish: []string{"$JS.API.INFO"}}
	admin := Permissions{User: UserStreamctl, Publish: []string{"$JS.API.INFO", "$JS.API.STREAM.NAMES", "$JS.API.STREAM.LIST"}}
	// The state of replays is a key-value bucket, which is a stream.
	admin.Publish = append(admin.Publish, "$KV.FP_REPLAYS.>", "$JS.API.STREAM.CREATE.KV_FP_REPLAYS", "$JS.API.DIRECT.GET.KV_FP_REPLAYS.>")
	operator := Permissions{
		User: UserOperator, Publish: []string{"$JS.API.INFO", "$JS.API.STREAM.NAMES", "$JS.API.STREAM.LIST"},
		// It runs streamctl, which has one inbox prefix for all its users. What
		// it could overhear there it may read itself.
		Subscribe: []string{"$JS.EVENT.ADVISORY.>", inbox(UserStreamctl)},
	}
	backup := Permissions{User: UserBackup, Publish: []string{"$JS.API.INFO", "$JS.API.STREAM.NAMES", "$JS.API.STREAM.LIST"}}
	copies := func(stream string) {
		for _, subject := range []string{"$JS.API.STREAM.INFO.", "$JS.API.STREAM.SNAPSHOT.", "$JS.API.STREAM.RESTORE."} {
			backup.Publish = append(backup.Publish, subject+stream)
		}
		backup.Publish = append(backup.Publish, "$JS.SNAPSHOT.ACK."+stream+".>", "$JS.SNAPSHOT.RESTORE."+stream+".>")
	}
	copies("KV_FP_REPLAYS")
	for _, p := range []*Permissions{&admin, &operator} {
		p.Publish = append(p.Publish, "$JS.API.STREAM.INFO.KV_FP_REPLAYS", "$JS.API.DIRECT.GET.KV_FP_REPLAYS",
			"$SYS.REQ.USER.INFO") // who am I, for the audit
	}

	for _, d := range Definition(Limits{}) {
		stream := d.Stream.Name
		api := func(p *Permissions, verbs ...string) {
			for _, verb := range verbs {
				// Most verbs end in the stream's name; those of one durable
				// or one subject say where it goes.
				if !strings.Contains(verb, "%s") {
					verb += ".%s"
				}
				p.Publish = append(p.Publish, "$JS.API."+fmt.Sprintf(verb, stream))
			}
		}
		api(&exporter, "STREAM.INFO", "DIRECT.GET")
		copies(stream)
		api(&admin, "STREAM.INFO", "STREAM.CREATE", "STREAM.UPDATE", "STREAM.MSG.GET", "DIRECT.GET", "DIRECT.GET.%s.>",
			"CONSUMER.NAMES", "CONSUMER.LIST", "CONSUMER.INFO.%s.*", "CONSUMER.CREATE.%s.>", "CONSUMER.DURABLE.CREATE.%s.*",
			"CONSUMER.DELETE.%s.*", "CONSUMER.MSG.NEXT.%s.*")
		api(&operator, "STREAM.INFO", "DIRECT.GET", "CONSUMER.NAMES", "CONSUMER.LIST", "CONSUMER.INFO.%s.*")
		if stream == StreamAudit {
			admin.Publish = append(admin.Publish, d.Stream.Subjects...)
			continue
		}
		api(&admin, "STREAM.PURGE", "STREAM.MSG.DELETE")
		switch stream {
		case StreamIngest:
			ingest.Publish = append(ingest.Publish, d.Stream.Subjects...)
			exporter.Publish = append(exporter.Publish, IngestSubject(HeartbeatSubscriber))
		case StreamEnriched:
			prefetcher.Publish = append(prefetcher.Publish, d.Stream.Subjects...)
		case StreamBackfill:
			admin.Publish = append(admin.Publish, d.Stream.Subjects...)
			// Live events that make way for newer ones go there.
			prefetcher.Publish = append(prefetcher.Publish, "fp.backfill."+StagePrefetcher+".*")
		case StreamDead:
			for _, p := range []*Permissions{&prefetcher, &persister} {
				p.Publish = append(p.Publish, "fp.dead."+p.User+".*")
			}
		}
		if stream != StreamDead {
			api(&exporter, "STREAM.PURGE")
		}
		for _, c := range d.Durables {
			stage := &prefetcher
			if strings.HasPrefix(c.Durable, StagePersister) {
				stage = &persister
			}
			api(stage, "STREAM.INFO", "DIRECT.GET", // lag
				"CONSUMER.INFO.%s."+c.Durable, "CONSUMER.MSG.NEXT.%s."+c.Durable)
			stage.Publish = append(stage.Publish,
				"$JS.ACK."+stream+"."+c.Durable+".>",
				// The form later servers give ack subjects: domain and account first.
				"$JS.ACK.*.*."+stream+"."+c.Durable+".>")
			api(&exporter, "CONSUMER.INFO.%s."+c.Durable)
			api(&admin, "CONSUMER.PAUSE.%s."+c.Durable)
		}
	}
	all := []Permissions{ingest, prefetcher, persister, exporter, admin, operator, backup}
	for i := range all {
		p := &all[i]
		p.Subscribe = append(p.Subscribe, inbox(p.User))
		slices.Sort(p.Publish)
		p.Publish = slices.Compact(p.Publish)
		slices.Sort(p.Subscribe)
	}
	return all
}

func inbox(name string) string { return "_INBOX_" + name + ".>" }

// WriteNATSUsers writes the authorization block of a nats-server's
// configuration. The users have no passwords: it belongs beside a tls block
// with verify_and_map, which takes the user from the client's certificate.
func WriteNATSUsers(w io.Writer) error {
	b := &strings.Builder{}
	list := func(what string, subjects []string) {
		fmt.Fprintf(b, "        %s: { allow: [\n", what)
		for _, s := range subjects {
			fmt.Fprintf(b, "          %q\n", s)
		}
		fmt.Fprint(b, "        ] }\n")
	}
	fmt.Fprint(b, "authorization {\n  users: [\n")
	for _, p := range AllPermissions() {
		fmt.Fprintf(b, "    {\n      user: %q\n      permissions: {\n", p.User)
		list("publish", p.Publish)
		list("subscribe", p.Subscribe)
		fmt.Fprint(b, "      }\n    }\n")
	}
	fmt.Fprint(b, "  ]\n}\n")
	if _, err := io.WriteString(w, b.String()); err != nil {
		return fmt.Errorf("write nats users: %w", err)
	}
	return nil
}

// The Redis users.
const (
	RedisUserPersister  = StagePersister
	RedisUserPrefetcher = StagePrefetcher
	RedisUserScorer     = "scorer"
	// RedisUserStreamctl looks at records, the quota and the server's state, and
	// erases records.
	RedisUserStreamctl = UserStreamctl
	// RedisUserOperator looks at records, the quota and the server's state.
	RedisUserOperator = UserOperator
)

// redisRights are the keys and commands of each Redis user.
func redisRights() []redisRight {
	const (
		records = "~" + record.KeyPrefix + "*"
		// What the runbooks ask a server that is slow or full.
		redisChecks = "+info +slowlog|get +slowlog|len"
	)
	return []redisRight{
		{RedisUserPersister, records, "+auth +hello +ping +eval +evalsha +getrange +set"},
		{RedisUserPrefetcher, "%R" + records + " ~" + QuotaKey, "+auth +hello +ping +get +eval +evalsha +hmget +hset +pexpire +time"},
		{RedisUserScorer, "%R" + records, "+auth +hello +ping +get +mget"},
		{RedisUserStreamctl, records + " %R~" + QuotaKey, "+auth +hello +ping +get +pttl +scan +del +eval +evalsha +hmget +time " + redisChecks},
		{RedisUserOperator, "%R" + records + " %R~" + QuotaKey, "+auth +hello +ping +get +pttl +hmget +time " + redisChecks},
	}
}

type redisRight struct{ user, keys, commands string }

// WriteRedisACL writes an ACL file for a single Redis 7 server or one with
// replicas. hashes holds the SHA-256 of each user's passwords in hexadecimal;
// two at a time make a rotation without a gap. Every service and the scorer
// need at least one; the users for people, streamctl and operator, are left out
// without; the default user is off.
func WriteRedisACL(w io.Writer, hashes map[string][]string) error {
	b := &strings.Builder{}
	b.WriteString("user default off resetkeys resetchannels -@all\n")
	for _, r := range redisRights() {
		if len(hashes[r.user]) == 0 && (r.user == RedisUserStreamctl || r.user == RedisUserOperator) {
			continue
		}
		if len(hashes[r.user]) == 0 {
			return fmt.Errorf("redis user %s has no password", r.user)
		}
		fmt.Fprintf(b, "user %s on", r.user)
		for _, h := range hashes[r.user] {
			fmt.Fprintf(b, " #%s", h)
		}
		fmt.Fprintf(b, " resetkeys resetchannels %s -@all %s\n", r.keys, r.commands)
	}
	if _, err := io.WriteString(w, b.String()); err != nil {
		return fmt.Errorf("write redis acl: %w", err)
	}
	return nil
}
