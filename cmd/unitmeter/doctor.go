package main

import (
	"context"
	"flag"

	"github.com/unitmeter/unitmeter/cmd/unitmeter/doctor"
)

// diagnose is the command "doctor".
func diagnose(ctx context.Context, t *terminal, flags *flag.FlagSet) error {
	cfg := doctor.Config{Environ: t.environ, Out: t.stdout, Notes: t.stderr}
	flags.BoolVar(&cfg.JSON, "json", false, "print a JSON object with all checks")
	flags.BoolVar(&cfg.Here, "here", false, "check with the user and the settings of this shell, not with those of unitmeter.service")
	if _, err := parse(t, flags, 0); err != nil {
		return err
	}
	return doctor.Run(ctx, cfg)
}
