// Package streaming speaks the wire protocols of exec, attach, port-forward and
// log.
package streaming
