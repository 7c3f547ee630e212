package validation

import (
	"fmt"
	"reflect"
	"slices"
	"strings"
	"unicode/utf8"

	"k8s.io/apimachinery/pkg/util/validation/field"
)

// maxTextErrors bounds how many strings of one object are named.
const maxTextErrors = 16

const notUTF8 = "must be valid UTF-8"

// validateText requires every string of an object of the hub to be UTF-8. JSON
// and YAML let no others through. Protobuf does, and what is stored then reads
// differently as protobuf and as JSON; some clients can't read it at all. Of a
// map and of a list of strings, the first that is wrong is named.
// What has an error already gets no second one.
func validateText(obj any, errs field.ErrorList) field.ErrorList {
	left := maxTextErrors
	walkText(nil, reflect.ValueOf(obj).Elem(), func(p *field.Path, detail string) bool {
		if !slices.ContainsFunc(errs, func(e *field.Error) bool { return e.Field == p.String() }) {
			errs = append(errs, field.Invalid(p, field.OmitValueType{}, detail))
			left--
		}
		return left > 0
	})
	return errs
}

// walkText calls report for what is wrong in value until it returns false, and
// then returns false itself.
func walkText(p *field.Path, value reflect.Value, report func(*field.Path, string) bool) bool {
	switch value.Kind() {
	case reflect.String:
		return utf8.ValidString(value.String()) || report(p, notUTF8)
	case reflect.Pointer:
		return value.IsNil() || walkText(p, value.Elem(), report)
	case reflect.Slice:
		switch value.Type().Elem().Kind() {
		case reflect.String:
			for i := range value.Len() {
				if !utf8.ValidString(value.Index(i).String()) {
					return report(p.Index(i), notUTF8)
				}
			}
		case reflect.Struct:
			for i := range value.Len() {
				if !walkText(p.Index(i), value.Index(i), report) {
					return false
				}
			}
		}
	case reflect.Map:
		if value.Type().Key().Kind() != reflect.String {
			return true
		}
		keys := value.MapKeys()
		slices.SortFunc(keys, func(a, b reflect.Value) int { return strings.Compare(a.String(), b.String()) })
		for _, key := range keys {
			if !utf8.ValidString(key.String()) {
				return report(p, fmt.Sprintf("the key %q %s", key.String(), notUTF8))
			}
			if v := value.MapIndex(key); v.Kind() == reflect.String && !utf8.ValidString(v.String()) {
				return report(p, fmt.Sprintf("the value of %q %s", key.String(), notUTF8))
			}
		}
	case reflect.Struct:
		for i := range value.NumField() {
			if f := value.Type().Field(i); f.IsExported() && !walkText(p.Child(jsonName(f.Name)), value.Field(i), report) {
				return false
			}
		}
	}
	return true
}

// jsonName is the name that a field of the hub has in every version.
func jsonName(name string) string {
	switch {
	case name == "ObjectMeta":
		return "metadata"
	case strings.ToUpper(name) == name:
		return strings.ToLower(name)
	}
	return strings.ToLower(name[:1]) + name[1:]
}
