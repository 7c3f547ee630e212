package server

import (
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/spf13/pflag"
)

func TestStreamOptionsOfPings(t *testing.T) {
	for name, tt := range map[string]struct {
		args               []string
		wantPing, wantPeer time.Duration
		wantErr            string // part of it; "" if there is none
	}{
		"the defaults":                        {nil, 15 * time.Second, time.Minute, ""},
		"both given":                          {[]string{"--stream-ping-interval=5s", "--stream-peer-timeout=20s"}, 5 * time.Second, 20 * time.Second, ""},
		"the longest interval":                {[]string{"--stream-ping-interval=30s"}, 30 * time.Second, time.Minute, ""},
		"an interval that client-go gives up": {[]string{"--stream-ping-interval=31s"}, 0, 0, "between 1s and 30s"},
		"no pings":                            {[]string{"--stream-ping-interval=0s"}, 0, 0, "between 1s and 30s"},
		"a timeout as long as the interval":   {[]string{"--stream-peer-timeout=15s"}, 0, 0, "must be longer than --stream-ping-interval 15s"},
		"a negative timeout":                  {[]string{"--stream-peer-timeout=-1s"}, 0, 0, "must be longer"},
	} {
		t.Run(name, func(t *testing.T) {
			o := newStreamOptions()
			flags := pflag.NewFlagSet("", pflag.ContinueOnError)
			o.addFlags(flags)
			if err := flags.Parse(tt.args); err != nil {
				t.Fatal(err)
			}
			err := errors.Join(o.validate()...)
			if tt.wantErr != "" {
				if err == nil || !strings.Contains(err.Error(), tt.wantErr) {
					t.Errorf("got %v, want %q", err, tt.wantErr)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			got := o.streaming(nil)
			if got.PingInterval != tt.wantPing || got.PeerTimeout != tt.wantPeer {
				t.Errorf("streams are pinged each %s and given up after %s, want %s and %s", got.PingInterval, got.PeerTimeout, tt.wantPing, tt.wantPeer)
			}
		})
	}
}
