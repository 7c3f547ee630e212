package storage

import (
	"errors"
	"fmt"
	"net/url"
	"path/filepath"
	"strings"
)

const supported = "use sqlite:///path/to/file.db or postgres://user:password@host:port/database"

// SQLiteEndpoint returns the endpoint of the SQLite database in a file.
func SQLiteEndpoint(path string) (string, error) {
	abs, err := filepath.Abs(path)
	if err != nil {
		return "", err
	}
	return (&url.URL{Scheme: "sqlite", Path: abs}).String(), nil
}

// ValidateEndpoint says whether Start could take an endpoint, without looking
// at the database.
func ValidateEndpoint(endpoint string) error {
	_, err := parseEndpoint(endpoint)
	return err
}

// parseEndpoint's errors hold nothing of the endpoint but its scheme and an
// SQLite path: anything else could be part of a password.
func parseEndpoint(endpoint string) (database, error) {
	scheme, _, ok := strings.Cut(endpoint, "://")
	if !ok {
		return nil, errors.New("the storage endpoint isn't a URL; " + supported)
	}
	switch scheme {
	case "sqlite", "postgres", "postgresql":
	default:
		if len(scheme) > 20 || strings.ContainsAny(scheme, "@:/") {
			return nil, errors.New("the storage endpoint's scheme isn't supported; " + supported)
		}
		return nil, fmt.Errorf("the storage endpoint's scheme %q isn't supported; %s", scheme, supported)
	}
	u, err := url.Parse(endpoint)
	if err != nil {
		return nil, fmt.Errorf("the %s storage endpoint can't be parsed as a URL; percent-encode special characters, in user names and passwords too", scheme)
	}
	if u.Fragment != "" {
		return nil, fmt.Errorf("the %s storage endpoint has a fragment (#…); write # as %%23", scheme)
	}
	if scheme == "sqlite" {
		return newSQLite(u)
	}
	return newPostgres(u)
}

// oneLine joins the lines of an error's text.
func oneLine(err error) error {
	if !strings.ContainsAny(err.Error(), "\r\n") {
		return err
	}
	return errors.New(strings.Join(strings.Fields(err.Error()), " "))
}
