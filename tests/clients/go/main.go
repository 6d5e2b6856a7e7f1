// Admission in Go with plain Redis commands: what docs/contracts.md shows, run against a real server by the tests.
//
// It reads one operation a line from standard input, as a JSON array of strings ("admit", user, session, amount in us,
// lasting ms | "release", user, session | "sweep", accounts), and answers each with one line of JSON.
package main

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"time"

	"github.com/redis/go-redis/v9"
)

// docs: begin
// Admission asks Redis whether a session may run. One for a program; safe for goroutines but for seen.
type Admission struct {
	client  *redis.Client
	script  *redis.Script     // holds.lua, the same file as in Python
	seen    map[string]string // of the newest answer: "epoch" and "entries"
	timeout time.Duration
}

// Answer is what holds.lua replies to admit; all amounts in us.
type Answer struct {
	Answer                                string // OK, AT_FLOOR, TOO_MANY_HOLDS or NOT_READY
	BalanceUs, HeldUs, FloorUs, ExpiresAt string
}

// Admit places the session's hold. The session may run when there is no error and Answer is OK.
// It may be called again with the same arguments: the new hold replaces the old one.
func (a *Admission) Admit(ctx context.Context, user, session, amountUs, lastsMs string) (Answer, error) {
	ctx, cancel := context.WithTimeout(ctx, a.timeout)
	defer cancel()
	// Run sends EVALSHA, and EVAL where the server does not know the script yet.
	reply, err := a.script.Run(ctx, a.client, nil,
		"admit", "user/"+user, session, amountUs, lastsMs, a.seen["epoch"], a.seen["entries"]).StringSlice()
	if err != nil {
		return Answer{}, err // away: decide what to do without Redis
	}
	if reply[0] != "NOT_READY" {
		a.seen["epoch"], a.seen["entries"] = reply[1], reply[2]
	}
	return Answer{reply[0], reply[3], reply[4], reply[5], reply[6]}, nil
}

// Release removes the session's hold: true when there was one.
func (a *Admission) Release(ctx context.Context, user, session string) (bool, error) {
	ctx, cancel := context.WithTimeout(ctx, a.timeout)
	defer cancel()
	reply, err := a.script.Run(ctx, a.client, nil, "release", "user/"+user, session).StringSlice()
	return err == nil && reply[0] == "RELEASED", err
}

// Open connects on first use.
func Open(address, pathOfScript string) (*Admission, error) {
	source, err := os.ReadFile(pathOfScript)
	if err != nil {
		return nil, err
	}
	// Only calls that may be made twice are made here, so the client may retry them.
	client := redis.NewClient(&redis.Options{Addr: address, MaxRetries: 2, ContextTimeoutEnabled: true})
	seen := map[string]string{"epoch": "0", "entries": "0"}
	return &Admission{client, redis.NewScript(string(source)), seen, 250 * time.Millisecond}, nil
}

// docs: end

func main() {
	admission, err := Open(os.Args[1], os.Args[2])
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	admission.timeout = time.Minute // A test is not about how fast the machine is.
	lines := bufio.NewScanner(os.Stdin)
	for lines.Scan() {
		var asked []string
		if err := json.Unmarshal(lines.Bytes(), &asked); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		answer, _ := json.Marshal(carryOut(context.Background(), admission, asked))
		fmt.Println(string(answer))
	}
}

func carryOut(ctx context.Context, admission *Admission, asked []string) []string {
	switch asked[0] {
	case "admit":
		a, err := admission.Admit(ctx, asked[1], asked[2], asked[3], asked[4])
		if err != nil {
			return []string{"ERROR", err.Error()}
		}
		return []string{a.Answer, a.BalanceUs, a.HeldUs, a.FloorUs, a.ExpiresAt}
	case "release":
		released, err := admission.Release(ctx, asked[1], asked[2])
		if err != nil {
			return []string{"ERROR", err.Error()}
		}
		return []string{fmt.Sprint(released)}
	}
	return []string{"ERROR", "what is " + asked[0] + "?"}
}
